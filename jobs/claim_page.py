"""CLAIMS.md: one row a method, drawn from stored outcomes and from nothing else."""

from pathlib import Path
from typing import Any

from jobs.claim import ClaimConfig, methods, read_claim
from jobs.claim_results import read_outcomes, shown_arm, shown_pair

HEAD = """# Claims

Every method here restates its paper's headline effect as an inequality between two arms that are measured
on the same held-out images with the same seeds. This page is drawn by `python -m jobs.reproduce --all` from
the outcomes in `configs/claims/*.results.json`, which the commands below make; nobody writes it by hand.

A claim *holds* if the whole 95 % interval of the paired difference over seeds (percentile bootstrap) is
better by more than the claim's margin; it is *reversed* if the whole interval is worse; else it *does not
show here*. With three seeds that interval is little more than the range of three differences and covers
less than it says; Student's t interval is given beside it, under each claim. Minutes are the processor time
of the runs from a clean start, {at_once} at a time.

| method | paper | our claim | our figure | the paper's figure | verdict | command | minutes |
|---|---|---|---|---|---|---|---|
"""
NOT_RUN = "not run"


def claims_page(folder: Path) -> str:
    """Return the page for all claims of a folder; those without an outcome are listed as not run."""
    rows, sections, at_once = [], [], 2
    for method in methods(folder):
        claim = read_claim(folder, method)
        outcomes = read_outcomes(folder, method)
        rows += [_row(method, claim, images, result) for images, result in (outcomes or {"": {}}).items()]
        sections += [_section(method, claim, images, result) for images, result in outcomes.items()]
        at_once = next((result["at_once"] for result in outcomes.values()), at_once)
    return HEAD.format(at_once=at_once) + "\n".join(rows) + "\n\n" + "\n".join(sections)


def _row(method: str, claim: ClaimConfig, images: str, result: dict[str, Any]) -> str:
    paper = f"[{claim.paper.title}](https://arxiv.org/abs/{claim.paper.arxiv})"
    if not result:
        command = f"`python -m jobs.reproduce {method}`"
        return _line(method, paper, claim.claim, "-", claim.paper.claim, NOT_RUN, command, "-")
    pair, metric = result["pairs"][0], result["pairs"][0]["metric"]
    arms = result["arms"]
    ours = f"{metric}: {shown_arm(arms[pair['arm']][metric])} against {shown_arm(arms[pair['to']][metric])}"
    low_high = shown_pair(pair).split(": ")[1].split(", t ")[0]
    ours += f"; difference {low_high} ({len(result['seeds'])} seeds, {images})"
    return _line(
        method, paper, claim.claim, ours, claim.paper.claim, f"**{result['verdict']}**",
        f"`{result['command']}`", str(result["minutes"]),
    )  # fmt: skip


def _section(method: str, claim: ClaimConfig, images: str, result: dict[str, Any]) -> str:
    metric = claim.pairs()[0].metric
    arms = result["arms"]
    metrics = list(dict.fromkeys([metric, *next(iter(arms.values()))]))
    lines = [f"## {method}, {images}: {result['verdict']}", "", claim.claim, ""]
    lines += [_line("arm", "what it is", *metrics), "|" + "---|" * (2 + len(metrics))]
    for name, arm in claim.arms.items():
        if name in arms:
            lines.append(_line(name, arm.says, *(shown_arm(arms[name][one]) for one in metrics)))
    lines += [
        "",
        "Mean and standard error over seeds. Paired differences, with the bootstrap's interval and t's:",
        "",
    ]
    lines += [f"- {pair['metric']}: {shown_pair(pair)}: {pair['verdict']}" for pair in result["pairs"]]
    return "\n".join([*lines, "", *([claim.note, ""] if claim.note else [])])


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

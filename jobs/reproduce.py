"""Measure what papers claim: `python -m jobs.reproduce dpm-solver-v3 pag`, and `--all` for the table of all.

Claims are the files of `configs/claims`. Without `--all` each named one is run over the cluster: arms by
seeds, and the runs that they build upon. What has finished is used again. `--smoke` runs a claim's path in
a minute and keeps nothing, for its figures mean nothing. `--all` runs nothing: it draws CLAIMS.md from the
stored outcomes. Where COUNTERPOINT_DATA names a folder with files of MNIST's format, claims are measured on
those images too.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cluster.connect import connected
from cluster.placement import ClusterView
from counterpoint.section import Section
from jobs.claim import ClaimConfig, VariationConfig, methods, read_claim
from jobs.claim_page import claims_page
from jobs.claim_plan import planned
from jobs.claim_results import outcome, shown_arm, shown_pair, store_outcome
from jobs.claim_work import do_all
from jobs.config import run_job
from jobs.run_names import RunUri

logger = logging.getLogger(__name__)

DATA = "COUNTERPOINT_DATA"
"""Variable that names a folder or URL of images in IDX files, on which claims are measured too."""


class ReproduceConfig(Section):
    """Run claims, or draw the table of all."""

    methods: tuple[str, ...] = ()
    """Names of claims: files of `claims` without .yaml."""
    all: bool = False
    """Draw `page` from the stored outcomes of all claims, and run nothing."""
    smoke: bool = False
    """Only prove that the path runs; nothing is stored beside the claims."""
    claims: Path = Path("configs/claims")
    """Folder of the claims and their outcomes."""
    page: Path = Path("CLAIMS.md")
    """Where `all` writes the table."""
    run: RunUri = "runs/claims"
    """URI below which runs are stored, by what they compute; delete it to measure from a clean start."""
    at_once: int = Field(default=0, ge=0)
    """Runs at the same time, each on one CPU; 0 takes as many as the cluster has free CPUs (or GPUs)."""
    gpus_per_run: float = Field(default=0.0, ge=0.0)
    """GPUs of each run."""

    @model_validator(mode="after")
    def _check(self) -> "ReproduceConfig":
        if bool(self.methods) == self.all:
            known = ", ".join(methods(self.claims)) or f"no file in {self.claims}"
            raise ValueError(f"name claims to run, or --all to draw the table of all; there are: {known}")
        return self


def main(config: ReproduceConfig) -> dict[str, Any]:
    """Run claims and print what they say, or draw the table; return the verdicts."""
    if config.all:
        config.page.write_text(claims_page(config.claims))
        return {"page": str(config.page), "claims": len(methods(config.claims))}
    claims = {method: read_claim(config.claims, method) for method in config.methods}
    verdicts = {}
    with connected(num_cpus=None):
        for method, claim in claims.items():
            for images, variations in sets_of_images(claim, config.smoke).items():
                verdicts[f"{method}, {images}"] = reproduce(config, method, claim, images, variations)
    return {"verdicts": verdicts, "smoke": config.smoke}


def sets_of_images(claim: ClaimConfig, smoke: bool) -> dict[str, tuple[VariationConfig, ...]]:
    """Return what each set of images, and a smoke test, change of a claim."""
    quick = (claim.smoke,) if smoke else ()
    found: dict[str, tuple[VariationConfig, ...]] = {"digits": quick}
    uri = os.environ.get(DATA)
    if uri and claim.idx is not None:
        found["idx"] = (_placed(claim.idx, uri), *quick)
    return found


def _placed(idx: VariationConfig, uri: str) -> VariationConfig:
    """Return the variation with the place of the images wherever it reads IDX files."""

    def placed(data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        whole = {key: placed(value) for key, value in data.items()}
        return whole | {"uri": uri} if whole.get("source") == "idx" else whole

    return VariationConfig.model_validate(placed(idx.model_dump()))


def reproduce(
    config: ReproduceConfig, method: str, claim: ClaimConfig, images: str,
    variations: tuple[VariationConfig, ...],
) -> str:  # fmt: skip
    """Run one claim on one set of images, print and store its outcome, and return the verdict."""
    plan = planned(claim, variations, f"{config.run.rstrip('/')}/{'smoke' if config.smoke else 'runs'}")
    at_once = config.at_once or room(config.gpus_per_run)
    logger.info("%s on %s: %d runs, %d at a time", method, images, len(plan.runs), at_once)
    found = do_all(plan.runs, at_once, config.gpus_per_run)
    result = outcome(claim, plan, found, f"python -m jobs.reproduce {method}", at_once)
    sys.stderr.write("\n".join(told(method, claim, images, result)) + "\n")
    if config.smoke:
        sys.stderr.write("This was a smoke test: its figures mean nothing and are not kept.\n")
        return "smoke test"
    path = store_outcome(config.claims, method, images, result)
    sys.stderr.write(f"stored in {path}; draw the table of all: python -m jobs.reproduce --all\n")
    return str(result["verdict"])


def room(gpus_per_run: float) -> int:
    """Return how many runs fit onto the cluster at once."""
    nodes = ClusterView.from_ray().nodes
    cpus = sum(int(node.available.get("CPU", 0.0)) for node in nodes)
    if not gpus_per_run:
        return max(1, cpus)
    gpus = sum(int(node.available.get("GPU", 0.0) / gpus_per_run) for node in nodes)
    return max(1, min(cpus, gpus))


def told(method: str, claim: ClaimConfig, images: str, result: dict[str, Any]) -> list[str]:
    """Return a claim's outcome as lines for a terminal."""
    lines = [f"{method} on {images}, {len(result['seeds'])} seeds, {result['minutes']} min: {claim.claim}"]
    for name, figures in result["arms"].items():
        shown = ", ".join(f"{metric} {shown_arm(summary)}" for metric, summary in figures.items())
        lines.append(f"  {name}: {shown}")
    lines += [f"  {pair['metric']}, {shown_pair(pair)}: {pair['verdict']}" for pair in result["pairs"]]
    return [*lines, f"  paper: {claim.paper.claim}", f"verdict: {result['verdict']}"]


def arguments(argv: Sequence[str]) -> list[str]:
    """Return the arguments as other verbs have them: bare words are the methods."""
    words = [word for word in argv if "=" not in word and not word.startswith("-")]
    rest = [word for word in argv if word not in words]
    return [*rest, f"methods=[{', '.join(words)}]"] if words else rest


if __name__ == "__main__":
    run_job(main, ReproduceConfig, arguments(sys.argv[1:]))

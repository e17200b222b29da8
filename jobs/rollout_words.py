"""What a comparison's figures say, in words that claim no more than is resolved."""

from collections.abc import Mapping, Sequence
from typing import Any

LEVEL = 0.05
Row = Mapping[str, Any]


def verdict(row: Row) -> str:
    """Return what a comparison resolves at the 5 % level, after Holm, and whether training seeds agree."""
    if row["p_holm"] >= LEVEL:
        return "not resolved"
    higher = row["difference"] > 0
    agreed = all((value > 0) == higher for value in row["by_seed"])
    return ("higher" if higher else "lower") + ("" if agreed else ", training seeds disagree")


def summary(results: Row) -> str:
    """Return a few sentences on what was compared and what came of it."""
    figures, scripted = results["figures"], results["references"]
    if not figures:
        return "Nothing has been played yet."
    parts = [_played(results), _standing(figures, results["baseline"], scripted)]
    parts += _resolved(results["comparisons"])
    return " ".join(part for part in parts if part)


def percent(value: float | None) -> str:
    """Return a share as a percentage with one decimal; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{100 * value:.1f}"


def signed(value: float | None) -> str:
    """Return a difference of shares in percentage points with its sign; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: float | None) -> str:
    """Return a p-value with two significant digits; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:.1e}" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def training_seeds(seeds: Sequence[Any]) -> str:
    """Return how many training seeds a figure rests on."""
    return "one training" if len(seeds) == 1 else f"{len(seeds)} training seeds"


def _played(results: Row) -> str:
    figures = results["figures"]
    policies = list(dict.fromkeys(row["policy"] for row in figures))
    rules = list(dict.fromkeys(row["rule"] for row in figures))
    most = max(row["episodes"] for row in figures)
    first = results["first_seed"]
    named = f" ({results['split']})" if results["split"] else ""
    return (
        f"{_counted(len(rules), 'rule')} for choosing actions and {_counted(len(policies), 'policy')} on the "
        f"same {results['episodes']} initial states, seeds {first} to {first + results['episodes'] - 1}"
        f"{named}; up to {most} episodes for each pair."
    )


def _standing(figures: Sequence[Row], baseline: str, scripted: Sequence[Row]) -> str:
    row = next((row for row in figures if row["rule"] == baseline), figures[0])
    if row["rate"] is None:
        return ""
    text = (
        f"With {row['rule']}, {row['policy']} succeeds in {percent(row['rate'])} % "
        f"[{percent(row['low'])}, {percent(row['high'])}] of them"
    )
    words = {"random": "random actions", "expert": "the scripted expert"}
    others = [
        f"{words.get(r['policy'], r['policy'])} in {percent(r['rate'])} %"
        for r in scripted
        if r["rate"] is not None
    ]
    return f"{text}; {' and '.join(others)}." if others else f"{text}."


def _resolved(comparisons: Sequence[Row]) -> list[str]:
    if not comparisons:
        return []
    found = [row for row in comparisons if row["p_holm"] < LEVEL]
    number = _counted(len(comparisons), "paired difference")
    if not found:
        return [f"Of {number} none is resolved after Holm's correction."]
    told = [
        f"{_named(row)} against {row['against_rule']} {signed(row['difference'])} points "
        f"[{signed(row['low'])}, {signed(row['high'])}] ({verdict(row)})"
        for row in found
        if row["kind"] != "policy"
    ]
    pairs = dict.fromkeys((r["policy"], r["against_policy"]) for r in found if r["kind"] == "policy")
    told += [_between_policies(comparisons, *pair) for pair in pairs]
    text = f"Of {number}, resolved after Holm's correction: {'; '.join(told)}."
    return [text if len(found) == len(comparisons) else f"{text} All others are not resolved."]


def _between_policies(comparisons: Sequence[Row], policy: str, against: str) -> str:
    rows = [
        r
        for r in comparisons
        if r["kind"] == "policy" and (r["policy"], r["against_policy"]) == (policy, against)
    ]
    found = [row["difference"] for row in rows if row["p_holm"] < LEVEL]
    span = signed(found[0]) if len(found) == 1 else f"{signed(min(found))} to {signed(max(found))}"
    return f"{policy} against {against} under {len(found)} of {_counted(len(rows), 'rule')}, {span} points"


def _named(row: Row) -> str:
    return f"{row['policy']} with {row['rule']}"


def _counted(number: int, what: str) -> str:
    plural = what[:-1] + "ies" if what.endswith("y") else what + "s"
    return f"{number} {what if number == 1 else plural}"

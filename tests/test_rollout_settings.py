"""The configuration of a comparison: what it plays, and what it refuses in one line."""

from pathlib import Path
from typing import Any

import pytest

from jobs.config import parse_config
from jobs.config_errors import ConfigError
from jobs.config_yaml import write_yaml
from jobs.rollout_settings import RolloutConfig

POLICIES: list[dict[str, Any]] = [
    {"name": "base", "run": "/runs/base-{seed}", "seeds": [0, 1]},
    {"name": "old", "run": "/runs/old"},
]
RULES: list[dict[str, Any]] = [
    {"name": "greedy"},
    {"name": "text", "selection": {"rule": "masked_condition", "mask": "text"}, "policies": ["base"]},
]


def parsed(folder: Path, **changes: Any) -> RolloutConfig:
    path = folder / "compare.yaml"
    path.write_text(write_yaml({"run": str(folder / "run"), "policies": POLICIES, "rules": RULES} | changes))
    return parse_config(RolloutConfig, [str(path)])


def test_every_policy_is_played_with_its_rules(tmp_path: Path) -> None:
    config = parsed(tmp_path, scripted=["expert"])
    assert [(cell.replica, cell.rule, cell.uri) for cell in config.cells()] == [
        ("expert", "expert", None),
        ("base-0", "greedy", "/runs/base-0"),
        ("base-0", "text", "/runs/base-0"),
        ("base-1", "greedy", "/runs/base-1"),
        ("base-1", "text", "/runs/base-1"),
        ("old", "greedy", "/runs/old"),
    ]
    assert [config.is_shown(cell) for cell in config.cells()] == [True, True, True, False, False, True]


def test_filmed_and_traced_seeds_are_the_first_unless_said_otherwise(tmp_path: Path) -> None:
    config = parsed(tmp_path, first_seed=50, episodes=9, videos={"among": 3})
    assert (config.seeds, config.traced, config.filmed) == (range(50, 59), {50}, {50, 51, 52})
    config = parsed(tmp_path, first_seed=50, episodes=9, videos={"among": 1}, trace_seeds=[57])
    assert (config.traced, config.filmed) == ({57}, {50, 57})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"policies": [{"name": "base", "run": "/runs/base", "seeds": [0]}]},
            "a run with {seed}, or neither",
        ),
        ({"policies": [{"name": "base", "run": "/runs/base-{seed}"}]}, "a run with {seed}, or neither"),
        ({"policies": [POLICIES[0] | {"seeds": [1, 1]}]}, "names a training seed twice"),
        ({"policies": [{"name": "expert", "run": "/r"}], "rules": RULES[:1]}, "'expert' is taken"),
        ({"rules": [{"name": "greedy"}, {"name": "Greedy"}]}, "'greedy' is taken"),
        ({"rules": [{"name": "..."}]}, "has no letter or digit"),
        ({"baseline": "gready"}, "baseline=gready is not a rule: give one of greedy, text"),
        ({"rules": [{"name": "greedy", "policies": ["joint"]}]}, "for the policy joint, which is not there"),
        ({"policies": []}, "policies"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(tmp_path, **changes)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)

"""What a run has left in its store, read in one go; parts that are not there are empty."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from actors.timeline import Timeline, read_timeline
from cluster.checkpoints import latest_checkpoint
from cluster.metrics_log import METRICS_FILE, read_metrics
from cluster.storage import RunStore
from jobs.config_yaml import read_yaml

logger = logging.getLogger(__name__)

Row = dict[str, Any]
CONFIG, ENVIRONMENT, RESULTS, EVALUATIONS = (
    "config.yaml", "environment.json", "results.json", "evaluations.jsonl",
)  # fmt: skip
_NAMED = re.compile(r"(teacher|student)\D+(\d+) steps?")
_SNAPSHOT = re.compile(r"grids/step-(\d+)-(\d+)\.png")


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of one stage of training, both ends included."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class HeadAges:
    """The heads of one critic group at the last checkpoint."""

    group: str
    ticks: int
    """Ticks of the refresh clock that the group has seen."""
    ages: tuple[int, ...]
    """Ticks since each head was made; `ticks` where it never was renewed."""
    updates: tuple[int, ...]
    """Optimizer updates of each head since then."""


@dataclass(frozen=True)
class RunRecord:
    """Everything a report says about a run comes from here."""

    uri: str
    source: str
    """Where the images come from, such as "digits"; empty where neither this run nor its teacher's says."""
    config_text: str
    environment: Row
    metrics: Sequence[Row]
    """One row per logged step, in order."""
    evaluations: Sequence[Row]
    """One row per scored snapshot, in order."""
    results: Row
    heads: Sequence[HeadAges]
    grids: dict[str, bytes]
    """PNG files by name, `grids/...`."""
    timeline: Timeline | None = None
    """Where the time of the newest recorded steps went."""

    @cached_property
    def config(self) -> Row:
        """The resolved configuration; empty where it is no mapping."""
        return _mapping(self.config_text)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages in the order in which they came; none for a run without stages."""
        stages: list[Stage] = []
        for row in self.metrics:
            name = row.get("stage")
            if name is None:
                continue
            if stages and stages[-1].name == name:
                stages[-1] = Stage(name, stages[-1].first, row["step"])
            else:
                stages.append(Stage(str(name), row["step"], row["step"]))
        return tuple(stages)

    @cached_property
    def is_student(self) -> bool:
        """Whether the run distilled, rather than trained, a model."""
        return (bool(self.stages) and not self.is_policy) or any(key[0] == "student" for key in self.scores)

    @property
    def is_policy(self) -> bool:
        """Whether the run trained a robot's policy."""
        return self.config.get("learner") == "policy"

    @property
    def is_linear(self) -> bool:
        """Whether the run made a diffusion transformer linear."""
        return self.config.get("learner") == "linear"

    @cached_property
    def scores(self) -> dict[tuple[str, int], Row]:
        """The rows of results by ("teacher" or "student", number of steps)."""
        found: dict[tuple[str, int], Row] = {}
        for row in self.rows:
            match = _NAMED.match(str(row.get("name", "")))
            if match:
                found.setdefault((match.group(1), int(match.group(2))), row)
        return found

    @property
    def rows(self) -> Sequence[Row]:
        """The rows of results as they were stored."""
        return [row for row in self.results.get("rows") or [] if isinstance(row, dict)]

    @property
    def pool(self) -> Row:
        """What results say of the pool of heads; empty where there was none."""
        pool = self.results.get("pool")
        return pool if isinstance(pool, dict) else {}

    @property
    def floor(self) -> Row:
        """The row that compares real images with real ones; empty where there is none."""
        return next((row for row in self.rows if "floor" in str(row.get("name", ""))), {})

    @property
    def warmup_end(self) -> int | None:
        """The last step of the warm-up, if there was one."""
        return next((stage.last for stage in self.stages if stage.name == "warmup"), None)

    def steps_scored(self) -> tuple[int, ...]:
        """Return the numbers of sampling steps that snapshots were scored at."""
        names = {key for row in self.evaluations for key in row if re.fullmatch(r"steps_\d+", key)}
        return tuple(sorted(int(name.removeprefix("steps_")) for name in names))

    def snapshots(self, sampling_steps: int) -> list[tuple[int, str]]:
        """Return (training step, file name) of the grids drawn with `sampling_steps` over training."""
        found = ((_SNAPSHOT.fullmatch(name), name) for name in self.grids)
        return sorted((int(m.group(1)), name) for m, name in found if m and int(m.group(2)) == sampling_steps)

    def group_labels(self) -> dict[str, str]:
        """Return how a person calls each critic group, by its key in the logged gaps."""
        groups = self.pool.get("groups") or []
        labels = {f"group{i}": f"t = {group.get('timestep')}" for i, group in enumerate(groups)}
        logged = sorted({key for row in self.metrics for key in row.get("gap") or {}}, key=_natural)
        return {key: labels.get(key, key) for key in logged}


def read_record(store: RunStore) -> RunRecord:
    """Return what `store` holds; ValueError when it holds no run at all."""
    if not any(store.exists(name) for name in (CONFIG, METRICS_FILE, RESULTS)):
        raise ValueError(
            f"run={store.uri} holds no run (no {CONFIG}, {METRICS_FILE} or {RESULTS}): "
            "give the URI of a run's directory"
        )
    grids = [name for name in store.list("grids") if name.endswith(".png")]
    config_text = store.read_text(CONFIG) if store.exists(CONFIG) else ""
    return RunRecord(
        uri=store.uri,
        source=_read_source(_mapping(config_text)),
        config_text=config_text,
        environment=read_json(store, ENVIRONMENT),
        metrics=[row for row in read_metrics(store) if "step" in row],
        evaluations=[row for row in read_metrics(store, EVALUATIONS) if "step" in row],
        results=read_json(store, RESULTS),
        heads=_read_heads(store),
        grids={name: store.read_bytes(name) for name in grids},
        timeline=read_timeline(store),
    )


def _mapping(text: str) -> Row:
    value = read_yaml(text) if text else None
    return value if isinstance(value, dict) else {}


def _read_source(config: Row) -> str:
    """Return the source of the images, for which a student's configuration points to its teacher's run."""
    teacher = config.get("teacher")
    if "data" not in config and isinstance(teacher, str):
        try:
            config = _mapping(RunStore(teacher).read_text(CONFIG))
        except (OSError, ValueError) as error:
            logger.warning("the teacher's run at %s cannot be read: %s", teacher, error)
    data = config.get("data")
    return str(data.get("source") or "") if isinstance(data, dict) else ""


def read_json(store: RunStore, name: str) -> Row:
    """Return the JSON object in the file `name`, empty where there is no such file."""
    if not store.exists(name):
        return {}
    value = json.loads(store.read_text(name))
    if not isinstance(value, dict):
        raise ValueError(f"{store.location(name)} must hold a JSON object, not a {type(value).__name__}")
    return value


def _read_heads(store: RunStore) -> list[HeadAges]:
    checkpoint = latest_checkpoint(store)
    if checkpoint is None:
        return []
    groups = sorted((name for name in checkpoint.files if name.startswith("critics-")), key=_natural)
    return [_heads_of(name, checkpoint.tensors(name)) for name in groups]


def _heads_of(name: str, state: dict[str, Tensor]) -> HeadAges:
    ticks = int(state["ticks"])
    banks = sorted({key.partition(".")[0] for key in state if key.endswith(".born")}, key=_natural)
    born = [tick for bank in banks for tick in state[f"{bank}.born"].tolist()]
    updates = [count for bank in banks for count in state[f"{bank}.updates"].tolist()]
    return HeadAges(name, ticks, tuple(ticks - tick for tick in born), tuple(updates))


def _natural(name: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", name)
    return (int(digits) if digits else 0, name)

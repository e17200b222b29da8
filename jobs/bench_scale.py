"""How distillation scales: MEASURED steps on this machine, and SIMULATED ones of SDXL on 1 to 1,024 GPUs.

    python -m jobs.bench scale configs/bench/scale.yaml

The simulator that plays both is calibrated on some of the measured arrangements and predicts the others; how
far off it is stands beside what it says of GPUs. Here all actors share this machine's few cores: more critic
actors or trainers than cores cannot make a step faster, and what is measured is how they share.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from actors.recipe import PIPELINE, PanelRecipe
from cluster.connect import connected
from cluster.environment import describe_environment
from cluster.storage import RunStore
from counterpoint.critics.config import CriticsConfig
from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig
from counterpoint.section import Section
from counterpoint.unet import UNetConfig, build_unet
from jobs.scale_cluster import World, ablate, sweep
from jobs.scale_figures import ClusterFigures, Workload
from jobs.scale_flops import step_flops
from jobs.scale_machine import calibrate, compare
from jobs.scale_measure import Arm, await_start, components, start
from jobs.scale_pages import scale_page, tables

logger = logging.getLogger(__name__)

BANDS = 4


class ArmConfig(Section):
    """An arrangement that is measured here."""

    actors: int = Field(default=4, ge=1, le=BANDS)
    """Actors that the four critic groups are shared out among."""
    trainers: int = Field(default=1, ge=1)
    """Trainers, each of which takes its share of the batch."""
    batch: int = Field(default=64, ge=4)
    """Samples of a step."""

    def arm(self) -> Arm:
        """Return it as results name it."""
        return Arm(self.actors, self.trainers, self.batch)


class MeasureConfig(Section):
    """What is measured on this machine; the weights are random, which costs the same."""

    data: DataConfig = DataConfig()
    """Images."""
    unet: UNetConfig = UNetConfig()
    """The network of teacher and student."""
    critics: CriticsConfig = CriticsConfig(levels_per_step=BANDS, heads_per_slot=2, refresh_rate=0.0025)
    """The panel; all four noise levels judge in every step."""
    calibrate: tuple[ArmConfig, ...] = (ArmConfig(actors=1), ArmConfig(actors=4))
    """Arrangements that the simulation is fitted to: one trainer, one batch size, few and many actors."""
    predict: tuple[ArmConfig, ...] = (
        ArmConfig(actors=2), ArmConfig(actors=2, batch=32), ArmConfig(actors=4, trainers=2)
    )  # fmt: skip
    """Arrangements that it must predict; they are measured, too."""
    rounds: int = Field(default=5, ge=1)
    """Rounds, in each of which all arrangements take a turn; figures are medians over rounds."""
    steps: int = Field(default=8, ge=2)
    """Steps of a turn."""
    repeats: int = Field(default=10, ge=1)
    """Measurements of each component alone."""

    @model_validator(mode="after")
    def _check(self) -> "MeasureConfig":
        if len(self.critics.noise_levels) != BANDS or self.critics.levels_per_step != BANDS:
            raise ValueError(
                f"critics.levels_per_step={self.critics.levels_per_step} of {len(self.critics.noise_levels)} "
                f"noise_levels: the simulation shares samples out among {BANDS} that all judge; set both so"
            )
        return self


class ScaleBenchConfig(Section):
    """Measured here, simulated elsewhere; see the module."""

    measure: MeasureConfig | None = MeasureConfig()
    """What is measured on this machine; null leaves it out."""
    gpus: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), min_length=1)
    """Sizes of the simulated cluster."""
    ablate: tuple[int, ...] = (8, 64, 512)
    """Sizes at which each setting's worth is asked."""
    unet: dict[str, Any] = {}
    """What the simulated network's configuration departs from SDXL's in."""
    critics: CriticsConfig = CriticsConfig(levels_per_step=BANDS, width=64, groups=8)
    """The simulated panel: NitroFusion's 480 heads."""
    clusters: tuple[ClusterFigures, ...] = Field(default=(ClusterFigures(),), min_length=1)
    """Stated figures, one set per kind of GPU; ablations take the first."""
    workload: Workload = Workload()
    """The simulated distillation."""
    simulated_steps: int = Field(default=4, ge=3)
    """Steps that are played; the first does not count."""
    seed: int = 0
    """Seed of the simulated jitter."""
    out: str | None = None
    """File for all results (JSON); none is written unless set."""
    page: str | None = None
    """File for a page with the curves (HTML); none is written unless set."""


def main(config: ScaleBenchConfig) -> dict[str, Any]:
    """Return the headline: how far off predictions are, and what is simulated at the largest size."""
    told: dict[str, Any] = {"environment": describe_environment(), "cores": os.cpu_count()}
    if config.measure is not None:
        told["measured"], told["check"] = measure(config.measure)
    flops = step_flops(config.unet, config.critics)
    told["flops"] = {"per_sample": vars(flops), "label": "COUNTED"}
    told["clusters"] = []
    for figures in config.clusters:
        world = World(flops, figures, config.workload, config.simulated_steps, config.seed)
        rows = sweep(config.gpus, world)
        told["clusters"].append({"figures": figures.model_dump(), "rows": rows, "label": "SIMULATED"})
    first = World(flops, config.clusters[0], config.workload, config.simulated_steps, config.seed)
    told["ablation"] = ablate(config.ablate, first)
    told["workload"] = config.workload.model_dump()
    write(config, told)
    sys.stderr.write(tables(told))
    return headline(told)


def measure(config: MeasureConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what was measured here, and the simulation's predictions beside it."""
    shown = [one.arm() for one in config.calibrate]
    arms = list(dict.fromkeys([*shown, *(one.arm() for one in config.predict)]))
    budget = config.rounds * config.steps + 4 * (config.repeats + 1) + config.steps
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scale-")))
        stack.enter_context(connected())
        recipe = untrained(config, folder)
        casts = []
        for arm in arms:
            # One after the other: many starts at once take turns on few cores and run into limits.
            cast = start(arm, recipe, config.data, BANDS, folder, budget)
            await_start([cast])
            casts.append(cast)
        by_arm = {cast.arm: cast for cast in casts}
        largest = max(shown, key=lambda arm: arm.actors)
        two = next((cast for cast in casts if cast.arm.trainers > 1), None)
        sizes = (max(2, largest.batch // 8), max(4, largest.batch // 2))
        alone = components(by_arm[largest], two, sizes, config.repeats)
        for cast in casts:
            cast.turn(config.steps)
            cast.seconds.clear()
            cast.parts.clear()
        for number in range(config.rounds):
            for cast in casts if number % 2 else casts[::-1]:
                cast.turn(config.steps)
            logger.info("round %d of %d", number + 1, config.rounds)
    measured = {cast.arm: cast.summary() for cast in casts}
    machine = calibrate(alone, {arm: measured[arm] for arm in shown}, os.cpu_count() or 1, BANDS)
    rows = compare(machine, measured, shown, BANDS)
    fitted = {"cores": machine.cores, "threads_of_one_process": machine.threads, "label": "CALIBRATED"}
    arrangements = {arm.name: summary for arm, summary in measured.items()}
    return {"components": alone, "arrangements": arrangements}, {"fitted": fitted, "rows": rows}


def untrained(config: MeasureConfig, folder: Path) -> PanelRecipe:
    """Save a teacher with random weights, and return the recipe of a panel over it."""
    train = load_data(config.data).train
    unet = build_unet(config.unet, train.image_shape[0], train.image_shape[1], train.num_classes, 0)
    unet.save_pretrained(folder / PIPELINE / "unet")
    return PanelRecipe(str(folder), config.critics, NoiseConfig(), 0)


def headline(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of the last line."""
    line: dict[str, Any] = {}
    if "check" in told:
        unseen = [row for row in told["check"]["rows"] if not row["calibrated_on"]]
        line["measured_step_s"] = {
            name: one["step_s"] for name, one in told["measured"]["arrangements"].items()
        }
        line["prediction_error"] = {row["arrangement"]: round(row["error"], 3) for row in unseen}
        line["largest_prediction_error"] = max((abs(row["error"]) for row in unseen), default=None)
    for cluster in told["clusters"]:
        last: Mapping[str, Any] = max(cluster["rows"], key=lambda row: row["gpus"])
        line[f"simulated_{cluster['figures']['name']}"] = {
            "gpus": last["gpus"], "images_per_second": round(last["images_per_second"], 1),
            "efficiency": round(last["efficiency"], 3), "bottleneck": last["bottleneck"],
        }  # fmt: skip
    return line


def write(config: ScaleBenchConfig, told: Mapping[str, Any]) -> None:
    """Write the results and the page where the configuration says."""
    files: Sequence[tuple[str | None, Any]] = (
        (config.out, lambda: json.dumps(told, indent=1, default=float) + "\n"),
        (config.page, lambda: scale_page(told)),
    )
    for name, text in files:
        if name is not None:
            path = Path(name).absolute()
            RunStore(str(path.parent)).write_text(path.name, text())

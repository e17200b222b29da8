"""What a job will hold, whether it fits, and where: `python -m jobs.plan configs/sdxl/plan.yaml --gpus 8`.

Takes the configuration of jobs.distill, jobs.distill_text or jobs.train as it is. Nothing is started and no
weights are made: networks are followed on paper (`counterpoint.footprint`), on any machine for any other.
"""

import dataclasses
import sys
from typing import Any

from counterpoint.footprint.sharding import CUDA_CONTEXT, Holding
from jobs.config import run_job
from jobs.config_errors import ConfigError
from jobs.plan_cast import CastPlan, Role, Sizes, plan_cast, sizes_of
from jobs.plan_networks import network_of
from jobs.plan_placement import TRAINER, Placement, place
from jobs.plan_remedies import Remedy, trainer_remedies
from jobs.plan_settings import MachinesConfig, PolicyPlan, parse_bytes, plan_of, with_teacher
from jobs.table import text_table

GIB = 2**30
COLUMNS = (
    "actors", "weights", "frozen", "gradients", "optimizer", "average", "activations", "exchange", "data",
    "GPU", "host",
)  # fmt: skip


def main(config: MachinesConfig) -> dict[str, Any]:
    """Estimate the cast, place it, write the tables to standard error, and return the figures."""
    if isinstance(config, PolicyPlan):
        raise ValueError(
            "learner=policy: policies are not planned yet; give a configuration of jobs.train (diffusion), "
            "jobs.distill or jobs.distill_text"
        )
    network = network_of(config)
    cast, sizes = plan_cast(config, network), sizes_of(config)
    limit = parse_bytes(config.gpu_memory)
    small = [r for r in cast.roles if config.gpus and r.holding.device > limit]
    placement = place(config, cast)
    held = [r.holding.device for r in small if r.name == TRAINER]
    remedies = trainer_remedies(config, cast.trace, held[0], limit) if held else []
    fits = placement.fits and not small
    sys.stderr.write("\n".join(words(config, cast, sizes, placement, remedies)) + "\n")
    return {
        "fits": fits,
        "trained_parameters": cast.trained,
        "heads": cast.heads,
        "roles": {
            r.name: {"count": r.count} | dataclasses.asdict(r.holding) for r in cast.roles
        },
        "bytes_per_step": {
            "each_trainer_to_trainers": cast.exchange,
            "to_critics": cast.panel.to_critics,
            "to_trainers": cast.panel.to_trainers,
            "between_replicas": cast.panel.between_replicas,
            "between_machines": placement.crossing if placement.fits else None,
        },
        "placement": placement.nodes,
        "gpus_each": {name: pool.gpus for name, pool in placement.pools.items()},
        "does_not_fit": [r.name for r in small],
        "remedies": [dataclasses.asdict(remedy) for remedy in remedies],
    }  # fmt: skip


def words(
    config: MachinesConfig, cast: CastPlan, sizes: Sizes, placement: Placement, remedies: list[Remedy]
) -> list[str]:
    """Return the plan as lines of text."""
    limit = parse_bytes(config.gpu_memory)
    lines = [f"{cast.trained / 1e6:,.1f} M parameters learn, {cast.heads} heads; GiB per actor:"]
    lines += text_table([_row(r.name, r.count, r.holding) for r in cast.roles], COLUMNS).splitlines()
    lines.append(
        "GPU and host are the most at one moment: gradients grow while activations shrink. A process on a "
        f"GPU is taken to need {CUDA_CONTEXT / GIB:g} GiB beside (an assumption). The network that scores is "
        "left out."
    )
    lines += [
        f"{field}: {batch} = {sizes.workers} workers x {sizes.accumulate} micro-batches x "
        f"{batch // (sizes.workers * sizes.accumulate)} samples"
        for field, batch in sizes.batches.items()
    ]
    small = [r.name for r in cast.roles if config.gpus and r.holding.device > limit]
    for role in cast.roles if config.gpus else ():
        verdict = "DOES NOT FIT" if role.name in small else "FITS"
        lines.append(
            f"{role.name}: {verdict}, {role.holding.device / GIB:.1f} of {limit / GIB:.1f} GiB of a GPU"
            + ("" if verdict == "FITS" else f": {_advice(role, remedies, limit, sizes)}")
        )
    if small:
        lines.append(f"were there memory for {' and '.join(small)}:")
    lines.append(str(placement.explanation))
    for node, held in placement.nodes.items():
        lines.append(f"{node}: " + (", ".join(f"{n} {name}" for name, n in held.items()) or "nothing"))
    lines += [
        f"suggested: {_gpus_setting(name)}={pool.gpus:g}"
        for name, pool in placement.pools.items()
        if config.gpus
    ]
    lines.append(
        f"a step sends {_size(cast.exchange)} from each trainer to the others, "
        f"{_size(cast.panel.to_critics)} to critics, {_size(cast.panel.to_trainers)} back, "
        f"{_size(cast.panel.between_replicas)} between replicas"
    )
    if placement.nodes:
        lines.append(f"between machines: {_size(placement.crossing)} a step")
    return lines


def _advice(role: Role, remedies: list[Remedy], limit: int, sizes: Sizes) -> str:
    if role.name == TRAINER:
        steps = [f"{r.setting} ({r.device / GIB:.1f} GiB)" for r in remedies]
        enough = remedies and remedies[-1].device <= limit
        return "set " + ", then ".join(steps) + ("" if enough else ", and it still does not fit: add workers")
    if role.name == "critics":
        return _fewer_samples(role.holding, limit, sizes) + (
            "raise critics.actors so that each hosts fewer groups, raise critics.levels_per_step or "
            "critics.replicas so that each judges fewer samples, or lower critics.heads_per_slot"
        )
    return "lower evaluation.batch_size" if role.name == "evaluator" else "lower pairs.chunk"


def _fewer_samples(critics: Holding, limit: int, sizes: Sizes) -> str:
    """The number of micro-batches with which critics fit, as their activations go with the samples."""
    rest = critics.device - critics.activations
    per_worker = sizes.batches.get("adversarial.batch_size", 0) // sizes.workers
    for accumulate in range(sizes.accumulate + 1, per_worker + 1):
        need = rest + critics.activations * sizes.accumulate // accumulate
        if per_worker % accumulate == 0 and need <= limit:
            return f"set trainer.accumulate={accumulate} (about {need / GIB:.1f} GiB), or "
    return ""


def _row(name: str, count: int, h: Holding) -> dict[str, Any]:
    sizes = (
        h.parameters, h.fixed, h.gradients, h.optimizer, h.average, h.activations, h.exchange, h.data,
        h.device, h.host,
    )  # fmt: skip
    return {"name": name, "actors": count} | dict(zip(COLUMNS[1:], (s / GIB for s in sizes), strict=True))


def _gpus_setting(role: str) -> str:
    keys = {TRAINER: "trainer.gpus_per_worker", "critics": "critics.gpus_per_actor"}
    return keys.get(role, "evaluation.gpus_per_worker")


def _size(count: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    try:
        model = plan_of(sys.argv[1:])
        argv = with_teacher(model, sys.argv[1:])
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    run_job(main, model, argv)

"""Two processes that train under one strategy after the other, and what they leave for tests to look at."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import UNet2DModel
from peft import LoraConfig, inject_adapter_in_model
from test_distillation import distiller
from test_policy_training import trainer as policy_trainer
from test_teacher import OPTIMIZER
from test_teacher import trainer as teacher_trainer
from tiny import digits, panel, unet
from torch import Tensor
from vla_parts import policy

from actors.worker import _meet
from cluster.checkpoints import load_checkpoint, save_checkpoint
from cluster.storage import RunStore
from counterpoint.critics.group import Samples
from counterpoint.critics.panel import LocalPanel, PanelVerdict
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import Distiller
from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.strategies.config import StrategyConfig
from counterpoint.teacher import TeacherConfig, TeacherTrainer

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"name": "fsdp"},
    "zero3": {"name": "deepspeed", "zero_stage": 3},
    "zero1": {"name": "deepspeed", "zero_stage": 1},
    "zero2": {"name": "deepspeed", "zero_stage": 2},
}
STEPS, CUT = 20, 12
ALONE = "alone"
COMPILED = "compiled"
"""Where DeepSpeed would leave what it compiles."""
SLOW = {
    "zero1",
    "zero2",
    "fsdp-accumulate",
    "zero2-accumulate",
    "zero3-accumulate-checkpointing",
    "zero3-bf16",
}
"""Trainings that other ones of these, of a day's tests, have the parts of."""


BEFORE = dict(zip(STRATEGIES, ["ddp", *STRATEGIES], strict=False))
"""Whose checkpoint each strategy goes on from."""


class GatheredPanel:
    """Rank 0's panel, asked by all ranks at once: it judges all samples together, as hosts do."""

    def __init__(self, local: LocalPanel, place: Place) -> None:
        self.local, self.pool, self.place = local, local.pool, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    def load(self, state: dict[str, dict[str, Tensor]], step: int) -> None:
        if self.place.rank == 0:
            self.local.load(state, step)

    def ask(self, samples: Samples, groups: Tensor) -> Any:
        said: list[Any] = [None] * self.place.ranks
        dist.all_gather_object(said, (samples.fake, samples.real, samples.labels, groups))
        told: list[Any] = [None]
        if self.place.rank == 0:
            fake, real, labels, seats = (torch.cat(parts) for parts in zip(*said, strict=True))
            whole = replace(samples, fake=fake, real=real, labels=labels)
            told = [self.local.ask(whole, seats).result()]
        dist.broadcast_object_list(told, src=0)
        verdict: PanelVerdict = told[0]
        if verdict.gradient is not None:
            mine = verdict.gradient.chunk(self.place.ranks)[self.place.rank]
            verdict = replace(verdict, gradient=self.place.ranks * mine)
        return Answered(verdict)


class Answered:
    def __init__(self, verdict: PanelVerdict) -> None:
        self.verdict = verdict

    def result(self) -> PanelVerdict:
        return self.verdict


def student(place: Place, accumulate: int = 1) -> Distiller:
    """A student of 20 steps: 6 of warm-up, 4 of heads alone, 10 against the panel."""
    local = panel(levels_per_step=2, order="student_first", refresh_rate=0.02)
    critics = GatheredPanel(local, place) if place.ranks > 1 else local
    adversarial = OptimizerConfig(
        learning_rate=1e-3, betas=(0.0, 0.99), weight_decay=0.01, warmup_steps=0, decay=False, ema_decay=0.9
    )
    return distiller(
        critics, place, accumulate, warmup={"steps": 6}, heads_alone=4, steps=10, optimizer=adversarial
    )


def run(trainer: Any, first: int, last: int) -> list[dict[str, Any]]:
    return [trainer.step(step) for step in range(first, last)]


def save(trainer: Any, folder: Path, step: int) -> None:
    """Write a checkpoint as the training loop does, every rank its share."""
    weights, files = trainer.weights(), trainer.state()
    if trainer.place.rank == 0:
        files = files | {"weights": weights}
    meet = _meet if trainer.place.ranks > 1 else (lambda mine: [mine])
    save_checkpoint(RunStore(str(folder)), step, files, {}, trainer.place.rank, meet)
    if trainer.place.ranks > 1:
        dist.barrier()


def load(trainer: Any, folder: Path, step: int) -> None:
    checkpoint = load_checkpoint(RunStore(str(folder)), step)
    trainer.load({name: checkpoint.stored(name) for name in checkpoint.files if name != "weights"}, step)


def tensors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Everything in a checkpoint that goes on, by file and name."""
    checkpoint = load_checkpoint(RunStore(str(folder)), step)
    return {f"{f}/{key}": x for f in checkpoint.files for key, x in checkpoint.tensors(f).items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any two tensors of one name."""
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n].double()).abs().max()) for n in one if one[n].numel())


SAVING = {"offload": True, "activation_checkpointing": True}
SHORT: dict[str, tuple[dict[str, Any], int]] = {
    "ddp-accumulate": ({}, 2),
    "ddp-bf16": ({"precision": "bf16"}, 1),
    "ddp-checkpointing": ({"activation_checkpointing": True}, 1),
    "fsdp-accumulate": (STRATEGIES["fsdp"], 2),
    "fsdp-bf16": (STRATEGIES["fsdp"] | {"precision": "bf16"}, 1),
    "fsdp-offload-checkpointing": (STRATEGIES["fsdp"] | SAVING, 1),
    "zero1-accumulate-bf16": (STRATEGIES["zero1"] | {"precision": "bf16"}, 2),
    "zero2-accumulate": (STRATEGIES["zero2"], 2),
    "zero2-offload-bf16": (STRATEGIES["zero2"] | {"offload": True, "precision": "bf16"}, 1),
    "zero3-accumulate-checkpointing": (STRATEGIES["zero3"] | {"activation_checkpointing": True}, 2),
    "zero3-offload": (STRATEGIES["zero3"] | {"offload": True}, 1),
    "zero3-bf16": (STRATEGIES["zero3"] | {"precision": "bf16"}, 1),
}  # fmt: skip
"""Settings and micro-batches of short trainings of a teacher."""
SHORT_STEPS = 4
POLICIES = ("ddp", "fsdp", "zero3")
POLICY_STEPS, POLICY_CUT = 6, 4
ADAPTED = ("fsdp", "zero2", "zero3")
ADAPTED_STEPS, ADAPTED_CUT = 4, 2


def teach(folder: Path, name: str, place: Place, accumulate: int) -> None:
    trainer = teacher_trainer(place, accumulate)
    run(trainer, 0, SHORT_STEPS)
    save(trainer, folder / "teacher" / name, SHORT_STEPS)
    trainer.learner.end()


def imitate(folder: Path, name: str, place: Place) -> None:
    """A policy's training through both stages, and once more from its middle."""
    trainer = policy_trainer(policy(), place)
    run(trainer, 0, POLICY_CUT)
    save(trainer, folder / "policy" / name, POLICY_CUT)
    run(trainer, POLICY_CUT, POLICY_STEPS)
    save(trainer, folder / "policy" / name, POLICY_STEPS)
    trainer.learner.end()
    again = policy_trainer(policy(seed=8), place)
    load(again, folder / "policy" / name, POLICY_CUT)
    run(again, POLICY_CUT, POLICY_STEPS)
    save(again, folder / "policy" / f"{name}-resumed", POLICY_STEPS)
    again.learner.end()


def adapted(seed: int = 0) -> UNet2DModel:
    """A frozen UNet with low-rank adapters, so that each block holds weights of both kinds."""
    network = unet(seed=seed).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1", "time_emb_proj"]), network)
    return network


def adapt(folder: Path, name: str, place: Place) -> None:
    """Train adapters; all but one process go on, over another network, from that one's middle."""
    config = TeacherConfig(steps=30, batch_size=12, optimizer=OPTIMIZER)
    noise = build_noise_scheduler(NoiseConfig())
    trainer = TeacherTrainer(adapted(seed=place.ranks), noise, digits(), config, 0, place)
    if name == ALONE:
        run(trainer, 0, ADAPTED_CUT)
        save(trainer, folder / "adapted" / name, ADAPTED_CUT)
    else:
        load(trainer, folder / "adapted" / ALONE, ADAPTED_CUT)
    run(trainer, ADAPTED_CUT, ADAPTED_STEPS)
    save(trainer, folder / "adapted" / name, ADAPTED_STEPS)
    trainer.learner.end()


def distil(folder: Path, name: str, before: str, place: Place) -> None:
    """The whole training, and both from the middle: of one process, and of two under another strategy."""
    trainer = student(place)
    load(trainer, folder / ALONE, CUT)
    run(trainer, CUT, STEPS)
    save(trainer, folder / f"{name}-from-{ALONE}", STEPS)
    load(trainer, folder / ALONE, 0)
    run(trainer, 0, CUT)
    save(trainer, folder / name, CUT)
    run(trainer, CUT, STEPS)
    save(trainer, folder / name, STEPS)
    load(trainer, folder / before, CUT)
    run(trainer, CUT, STEPS)
    save(trainer, folder / f"{name}-from-{before}", STEPS)
    trainer.learner.end()


def work(rank: int, folder: str, left_out: set[str]) -> None:
    """One of the two processes; each strategy goes on from a checkpoint of the one before, too."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["TORCH_EXTENSIONS_DIR"] = f"{folder}/{COMPILED}"
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=240)
    )
    at = Path(folder)

    def place(options: dict[str, Any]) -> Place:
        return Place(rank, 2, strategy=StrategyConfig(**options))

    for name, options in STRATEGIES.items():
        if name not in left_out:
            distil(at, name, BEFORE[name], place(options))
    for name, (options, accumulate) in SHORT.items():
        if name not in left_out:
            teach(at, name, place(options), accumulate)
    for name in POLICIES:
        imitate(at, name, place(STRATEGIES[name]))
    for name in ADAPTED:
        adapt(at, name, place(STRATEGIES[name]))
    dist.destroy_process_group()


def alone(folder: Path) -> None:
    """What one process makes of the same trainings."""
    trainer = student(Place())
    save(trainer, folder / ALONE, 0)
    run(trainer, 0, CUT)
    save(trainer, folder / ALONE, CUT)
    run(trainer, CUT, STEPS)
    save(trainer, folder / ALONE, STEPS)
    teach(folder, ALONE, Place(), 1)
    imitate(folder, ALONE, Place())
    adapt(folder, ALONE, Place())

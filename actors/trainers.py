"""How a worker makes its trainer: from storage and configuration, on any machine."""

import logging
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from actors.panel import HostHandle, RemotePanel
from actors.recipe import PanelRecipe, build_layout, build_local_panel, load_network, load_unet
from actors.worker import Report
from cluster.storage import RunStore
from counterpoint.critics.panel import Panel
from counterpoint.data import DataConfig, load_data
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.distillation import AdversarialConfig, Distiller, WarmupConfig
from counterpoint.dit import DiTConfig, build_network
from counterpoint.pairs import Pairs, PairsConfig, make_pairs, pairs_from_tensors
from counterpoint.place import Place
from counterpoint.sampling import build_sampler
from counterpoint.seeds import seed_of
from counterpoint.student import MAX_STEPS, StudentConfig, student_timesteps
from counterpoint.teacher import TeacherConfig, TeacherTrainer
from counterpoint.unet import UNetConfig, frozen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherRecipe:
    """What a teacher's trainer is made of; call it in a worker."""

    data: DataConfig
    network: UNetConfig | DiTConfig
    noise: NoiseConfig
    teacher: TeacherConfig
    seed: int
    accumulate: int = 1

    def __call__(self, place: Place, store: RunStore, report: Report) -> TeacherTrainer:
        """Build this rank's trainer."""
        noise = build_noise_scheduler(self.noise)
        train = load_data(self.data).train
        return TeacherTrainer(self.build(), noise, train, self.teacher, self.seed, place, self.accumulate)

    def build(self) -> Any:
        """Build the network with its first weights."""
        train = load_data(self.data).train
        channels, side, _ = train.image_shape
        return build_network(self.network, channels, side, train.num_classes, seed_of(self.seed, "unet"))


@dataclass(frozen=True)
class StudentRecipe:
    """What a student's trainer is made of; call it in a worker."""

    panel: PanelRecipe
    hosts: tuple[HostHandle, ...]
    """The hosts of the critic groups; empty for a panel in this process."""
    data: DataConfig
    pairs: PairsConfig
    student: StudentConfig
    warmup: WarmupConfig
    adversarial: AdversarialConfig
    seed: int
    start: str | None = None
    """URI of a run to start from: its student's weights and its pairs."""
    accumulate: int = 1
    patience: float = 120.0

    def __call__(self, place: Place, store: RunStore, report: Report) -> Distiller:
        """Build this rank's trainer, after making what pairs are missing."""
        train = self._images()
        noise = build_noise_scheduler(self.panel.noise)
        pairs = self._pairs(place, RunStore(self.start) if self.start else store, train.num_classes, report)
        return Distiller(
            self._student(), noise, pairs, train, self._panel(place),
            self.student, self.warmup, self.adversarial, self.seed, place, self.accumulate,
        )  # fmt: skip

    def _images(self) -> Any:
        """Return the real samples that critics may compare with."""
        return load_data(self.data).train

    def _student(self) -> Any:
        """Return the network that is trained, with the weights that it starts from."""
        return load_unet(self.start or self.panel.teacher)

    def _chunk(self, teacher: Any, sampler: Any, chunk: int, num_classes: int, times: list[int]) -> Pairs:
        """Make chunk number `chunk` of the pairs."""
        return make_pairs(teacher, sampler, self.pairs, chunk, num_classes, times, self.seed)

    def _panel(self, place: Place) -> Panel | None:
        if not self.adversarial.uses_panel:
            return None
        if not self.hosts:
            return build_local_panel(self.panel, place.device)
        pool = build_layout(self.panel)
        return RemotePanel(pool, self.hosts, place.rank, place.ranks, self.patience)

    def _pairs(self, place: Place, store: RunStore, num_classes: int, report: Report) -> Pairs:
        """Load the pairs, making in turn with the other ranks the chunks that storage does not have yet."""
        chunks = -(-self.pairs.count // self.pairs.chunk)
        names = [f"pairs/chunk-{chunk:05d}.safetensors" for chunk in range(chunks)]
        missing = [chunk for chunk in range(chunks) if not store.exists(names[chunk])]
        if place.ranks > 1:
            dist.barrier()
        if missing:
            teacher = frozen(load_network(self.panel).to(place.device))
            sampler = build_sampler(self.pairs.sampler, build_noise_scheduler(self.panel.noise))
            times = student_timesteps(MAX_STEPS, self.panel.noise.num_train_timesteps)
            for done, chunk in enumerate(missing[place.rank :: place.ranks]):
                report({"stage": "pairs", "step": done * place.ranks, "total": len(missing)})
                pairs = self._chunk(teacher, sampler, chunk, num_classes, times)
                store.write_bytes(names[chunk], safetensors.torch.save(contiguous(pairs)))
            if place.ranks > 1:
                dist.barrier()
        stored = [safetensors.torch.load(store.read_bytes(name)) for name in names]
        return pairs_from_tensors(stored, self.panel.noise.num_train_timesteps)


def contiguous(pairs: Pairs) -> dict[str, torch.Tensor]:
    """Return the pairs' tensors as safetensors wants them."""
    return {name: tensor.contiguous() for name, tensor in pairs.tensors().items()}

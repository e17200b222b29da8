"""How a worker makes the trainer of a text-to-image student: encoded prompts, latents, LoRA."""

from dataclasses import dataclass
from typing import Any

import torch

from actors.prompted import load_prompted_unet, open_table
from actors.trainers import StudentRecipe
from counterpoint.lora import LoraSection, add_lora
from counterpoint.pairs import Pairs, make_pairs
from counterpoint.prompts import LatentImages, held_out
from counterpoint.seeds import seed_of

WHOLE = LoraSection()


@dataclass(frozen=True)
class PromptedStudentRecipe(StudentRecipe):
    """What a text-to-image student's trainer is made of; `panel.prompts` says where its prompts are.

    Of `data` nothing is read: real samples are the table's latents.
    """

    lora: LoraSection = WHOLE
    held_out_share: float = 0.1
    """Share of the prompts that no pair is made of."""

    def _images(self) -> Any:
        assert self.panel.prompts is not None
        return LatentImages(open_table(self.panel.prompts.table))

    def _student(self) -> Any:
        assert self.panel.prompts is not None
        unet = load_prompted_unet(self.start or self.panel.teacher, self.panel.prompts)
        return add_lora(unet, self.lora, seed_of(self.seed, "lora")) if self.lora.rank else unet

    def _chunk(self, teacher: Any, sampler: Any, chunk: int, num_classes: int, times: list[int]) -> Pairs:
        rows: torch.Tensor = held_out(num_classes, self.held_out_share, self.seed)[0]
        return make_pairs(
            teacher, sampler, self.pairs, chunk, num_classes, times, self.seed, conditions=rows, clip=False
        )

"""The control of perturbed-attention guidance: as many forward passes, as long steps, no meaning."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from counterpoint.guiders.perturbed_attention import BatchedPerturbedAttentionGuidance
from counterpoint.seeds import generator


class RandomDirectionGuidance(BatchedPerturbedAttentionGuidance):
    """eps = guided + s r: r is noise that has, in each sample and step, the norm of cond - perturbed.

    The same as `BatchedPerturbedAttentionGuidance`, of which it takes the arguments, in all else. The noise
    follows from `seed`, the step and a sample's place in the batch.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.0,
        perturbed_guidance_scale: float = 1.0,
        layers: Sequence[str | int] = ("mid",),
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(guidance_scale, perturbed_guidance_scale, layers, start, stop, enabled)
        self.seed = seed

    def direction(self, conditional: Tensor, perturbed: Tensor) -> Tensor:
        """Return noise [B,...] of the norm of conditional - perturbed, sample by sample."""
        stream = generator(self.seed, "random-direction", self._step or 0)
        noise = torch.randn(conditional.shape, generator=stream).to(conditional)
        dims = tuple(range(1, noise.ndim))
        norm = torch.linalg.vector_norm(conditional - perturbed, dim=dims, keepdim=True)
        return noise * (norm / torch.linalg.vector_norm(noise, dim=dims, keepdim=True))

"""Class-conditional image generation as a diffusers pipeline: what a run saves and a user loads."""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# diffusers loads a saved scheduler only from a module that has been imported.
import counterpoint.scheduler
import counterpoint.solvers.dpm_solver_v3  # noqa: F401
from counterpoint.guidance import BaseGuidance
from counterpoint.sampling import Generators, sample
from counterpoint.unet import null_class


class ClassConditionalPipeline(DiffusionPipeline):
    """A UNet2DModel with class labels and any scheduler; `save_pretrained` and `from_pretrained` as usual.

    With `TimestepShiftScheduler` it is the distilled student (1 to 4 steps), with a multi-step scheduler the
    teacher.
    """

    unet: UNet2DModel
    scheduler: SchedulerMixin

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | Tensor,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guider: BaseGuidance | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate one image for each entry of `class_labels` [B].

        `generator` is one torch.Generator for the batch, or one per image, in which case an image does not
        depend on its neighbours. `output_type` is "pil", "np" ([B,H,W,C] in [0,1]) or "pt" ([B,C,H,W] in
        [-1,1]). A `guider` (see `counterpoint.guidance`) takes the place of `guidance_scale`. The label after
        the last class is the null class: the unconditional model. Raises ValueError for a class that the
        network does not know.
        """
        labels = torch.as_tensor(class_labels, dtype=torch.long, device=self.unet.device)
        classes = null_class(self.unet)
        if labels.numel() == 0 or labels.min() < 0 or labels.max() > classes:
            raise ValueError(
                f"class_labels={labels.tolist()} must be classes from 0 to {classes - 1}, {classes} for none"
            )
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        shape = (len(labels), channels, side, side)
        x = randn_tensor(shape, generator=generator, device=self.unet.device, dtype=self.unet.dtype)
        x, _ = sample(
            self.unet,
            self.scheduler,
            x,
            labels,
            num_inference_steps,
            guidance_scale,
            generator,
            progress=self.progress_bar,
            guider=guider,
        )
        images = self._as(output_type, x.clamp(-1.0, 1.0).cpu())
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _as(self, output_type: str, images: Tensor) -> Any:
        if output_type == "pt":
            return images
        array = (images / 2 + 0.5).permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

"""Sharpness of images as the share of their energy at high spatial frequencies."""

import torch
from torch import Tensor

CUTOFF = 0.25
"""Radial frequency, in cycles a pixel, from which energy counts as high: half the Nyquist frequency."""


def high_frequency_energy(images: Tensor, cutoff: float = CUTOFF) -> float:
    """Return the share of spectral energy at radial frequencies >= `cutoff` of `images` [N,C,H,W].

    Each image's mean is left out and energies are summed over all images before the division, so flat images
    do no harm; the result lies in [0,1], or is 0 when every image is flat.
    """
    spectrum = torch.fft.fft2(images.double(), norm="ortho").abs().square().sum(dim=(0, 1))
    vertical, horizontal = (torch.fft.fftfreq(length, device=images.device) for length in images.shape[2:])
    radius = torch.hypot(vertical[:, None], horizontal[None, :])
    total = float(spectrum[radius > 0].sum())
    return float(spectrum[radius >= cutoff].sum()) / total if total > 0 else 0.0


def sharpness_ratio(images: Tensor, reference: Tensor) -> float:
    """Return the high-frequency energy share of `images` over that of `reference`; below 1 is softer.

    Raises ValueError when the reference has no energy at high frequencies.
    """
    share = high_frequency_energy(reference)
    if share == 0.0:
        raise ValueError("sharpness reference has no energy at high frequencies: pass real or teacher images")
    return high_frequency_energy(images) / share

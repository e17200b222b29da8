"""Empirical model statistics l, s, b of DPM-Solver-v3 (Zheng et al. 2023, arXiv 2310.13268, sec. 3).

A file of them is a safetensors file of `lambdas` [N+1] and `l`, `s`, `b` [N+1,C,H,W], all float64, whose
metadata say which network, schedule and guidance they were measured on.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FILE = "statistics.safetensors"
LIMITS = {"noise": (0.0, -1.0), "data": (1.0, 0.0)}
"""l and s of the fixed coefficients by name; b is 0."""
_TENSORS = ("lambdas", "l", "s", "b")
_METADATA = "made_for"


@dataclass(frozen=True, eq=False)
class ModelStatistics:
    """Coefficients over the half log signal-to-noise ratio lambda, linear between grid points."""

    lambdas: Tensor
    """Grid [N+1], float64, ascending: from noise to data."""
    l: Tensor  # noqa: E741
    """Linear part of the network [N+1,C,H,W], float64."""
    s: Tensor
    """Growth rate of the non-linear part, same shape."""
    b: Tensor
    """Drift of the non-linear part, same shape."""
    made_for: Mapping[str, str] = field(default_factory=dict)
    """What they were measured on; see `model_statistics.describe`. Empty for the fixed limits."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [C,H,W] of the samples, or (1, 1, 1) where any shape will do."""
        return tuple(self.l.shape[1:])

    def at(self, lambdas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return l, s, b, each [n,C,H,W], at `lambdas` [n] by linear interpolation."""
        right = torch.searchsorted(self.lambdas, lambdas).clamp(1, len(self.lambdas) - 1)
        start, end = self.lambdas[right - 1], self.lambdas[right]
        weight = ((lambdas - start) / (end - start)).clamp(0.0, 1.0).reshape(-1, 1, 1, 1)
        l, s, b = (torch.lerp(x[right - 1], x[right], weight) for x in (self.l, self.s, self.b))  # noqa: E741
        return l, s, b


def limit(name: str, lambdas: Tensor) -> ModelStatistics:
    """Return the fixed coefficients under which the solver predicts noise (l=0, s=-1) or data (l=1, s=0).

    Eq. 69 of the paper: DPM-Solver and DPM-Solver++. `lambdas` [n] gives the ends; the grid between is fine
    enough for the integrals to be exact to rounding.
    """
    l, s = LIMITS[name]  # noqa: E741
    grid = torch.linspace(float(lambdas.min()), float(lambdas.max()), 65, dtype=torch.float64)
    ones = torch.ones(len(grid), 1, 1, 1, dtype=torch.float64)
    return ModelStatistics(grid, l * ones, s * ones, 0.0 * ones)


def half_log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return lambda = log(alpha / sigma), float64, for each abar in `alphas_cumprod`."""
    abar = alphas_cumprod.double()
    return 0.5 * (abar.log() - (-abar).log1p())


def schedule_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what statistics must share with the scheduler of that configuration, each value as text."""
    names = ["num_train_timesteps", "prediction_type"]
    if config.get("trained_betas") is not None:
        betas = ",".join(f"{float(beta):.6g}" for beta in config["trained_betas"])
        return {name: str(config[name]) for name in names} | {
            "beta_schedule": f"trained_betas {hashlib.sha256(betas.encode()).hexdigest()[:12]}"
        }
    names.append("beta_schedule")
    if config["beta_schedule"] != "squaredcos_cap_v2":
        names += ["beta_start", "beta_end"]
    return {name: str(config[name]) for name in names}


def save_statistics(path: str | Path, statistics: ModelStatistics) -> None:
    """Write the file."""
    tensors = {name: getattr(statistics, name).contiguous() for name in _TENSORS}
    save_file(tensors, str(path), metadata={_METADATA: json.dumps(dict(statistics.made_for))})


def load_statistics(uri: str | Path) -> ModelStatistics:
    """Read a file from a path or any URI that fsspec knows; ValueError if there is none or it is another."""
    try:
        with fsspec.open(str(uri), "rb") as remote, tempfile.NamedTemporaryFile() as local:
            local.write(remote.read())
            local.flush()
            with safe_open(local.name, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                made_for = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    except FileNotFoundError as error:
        raise ValueError(f"statistics={uri} is not there: make the file with jobs.statistics") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"statistics={uri} is not a file of model statistics: {error}") from error
    return ModelStatistics(**tensors, made_for=made_for)


def check_schedule(statistics: ModelStatistics, config: Mapping[str, Any], uri: str) -> None:
    """Raise ValueError, in one line, if the statistics were measured under another schedule."""
    for name, value in schedule_of(config).items():
        made = statistics.made_for.get(name)
        if made is not None and made != value:
            raise ValueError(
                f"statistics={uri} were made for {name}={made}, not for {value}: "
                "make them anew with jobs.statistics for this model"
            )

"""Which action tokenizer a policy speaks through: built from data, written to a folder and read back."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator
from tokenizers import Tokenizer

from counterpoint.actions.fast import MAX_VOCABULARY, FastTokenizer
from counterpoint.actions.statistics import ActionStatistics
from counterpoint.actions.tokenizer import ActionTokenizer, Undecodable
from counterpoint.actions.uniform import UniformTokenizer
from counterpoint.section import Section

__all__ = [
    "ActionTokenizer",
    "TokenizerConfig",
    "Undecodable",
    "build_tokenizer",
    "load_tokenizer",
    "save_tokenizer",
]

FORMAT = 1
FILE, BPE_FILE = "action_tokenizer.json", "action_bpe.json"


class TokenizerConfig(Section):
    """How chunks of actions become tokens."""

    kind: Literal["uniform", "fast"] = "uniform"
    """uniform: one token per step and dimension (OpenVLA). fast: compressed frequencies (FAST)."""
    bins: int = Field(default=256, ge=3)
    """Uniform: tokens, shared by all dimensions; 256 as in OpenVLA."""
    scale: float = Field(default=10.0, gt=0.0, allow_inf_nan=False)
    """Fast: coefficients are multiplied by this before rounding; 10 as in FAST."""
    vocab_size: int = Field(default=1024, ge=3, le=MAX_VOCABULARY)
    """Fast: most tokens, the end token included; 1024 as in FAST."""
    quantiles: tuple[float, float] = (0.01, 0.99)
    """Quantiles of the data that are scaled to -1 and 1."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"quantiles={self.quantiles} must rise within [0, 1]")
        return self


class _Stored(Section):
    """The JSON file of a tokenizer."""

    format: Literal[1]
    kind: Literal["uniform", "fast"]
    horizon: int = Field(ge=1)
    statistics: ActionStatistics
    bins: int | None = None
    scale: float | None = None
    least: int | None = None
    alphabet: int | None = None
    bpe_sha256: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "_Stored":
        needed = {"uniform": {"bins"}, "fast": {"scale", "least", "alphabet", "bpe_sha256"}}
        for kind, fields in needed.items():
            given = {field for field in fields if getattr(self, field) is not None}
            if given != (fields if kind == self.kind else set()):
                raise ValueError(f"a tokenizer of kind {self.kind} has {sorted(given)} of {sorted(fields)}")
        return self


def build_tokenizer(config: TokenizerConfig, actions: np.ndarray, fingerprint: str) -> ActionTokenizer:
    """Return the tokenizer of chunks like `actions` [F,H,D], in environment units.

    Statistics are of all steps of all chunks; `fingerprint` names the data. The same data give the same
    tokenizer. Raises ValueError, in one line, if the actions are of another shape, empty or not finite.
    """
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 3 or 0 in actions.shape:
        raise ValueError(f"actions have shape {list(actions.shape)}: give chunks [F,H,D], not empty")
    steps = actions.reshape(-1, actions.shape[-1])
    statistics = ActionStatistics.from_actions(steps, fingerprint, config.quantiles)
    if config.kind == "fast":
        return FastTokenizer.train(statistics, actions, config.scale, config.vocab_size)
    return UniformTokenizer(statistics, actions.shape[1], config.bins)


def save_tokenizer(tokenizer: ActionTokenizer, folder: Path) -> None:
    """Write the tokenizer into `folder`, as JSON; it is made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, object] = {"format": FORMAT}
    if isinstance(tokenizer, FastTokenizer):
        encoding = tokenizer.bpe.to_str()
        (folder / BPE_FILE).write_text(encoding, encoding="utf-8", newline="\n")
        stored |= {"kind": "fast", "scale": tokenizer.scale, "least": tokenizer.least}
        stored |= {"alphabet": tokenizer.alphabet, "bpe_sha256": _sha256(encoding)}
    elif isinstance(tokenizer, UniformTokenizer):
        stored |= {"kind": "uniform", "bins": tokenizer.bins}
    else:
        raise ValueError(f"a {type(tokenizer).__name__} cannot be saved: use a uniform or fast tokenizer")
    stored |= {"horizon": tokenizer.horizon, "statistics": tokenizer.statistics.model_dump(mode="json")}
    (folder / FILE).write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> ActionTokenizer:
    """Read what `save_tokenizer` wrote.

    Raises ValueError, in one line that names the file, if one is missing, corrupt, of another format, out of
    range, or does not fit the other.
    """
    path = folder / FILE
    try:
        stored = _read(path)
        if stored.kind == "uniform":
            return UniformTokenizer(stored.statistics, stored.horizon, stored.bins or 0)
        path = folder / BPE_FILE
        encoding = path.read_text(encoding="utf-8")
        if _sha256(encoding) != stored.bpe_sha256:
            raise ValueError(f"it is not the file that {FILE} was saved with")
        return FastTokenizer(
            stored.statistics,
            stored.horizon,
            stored.scale or 0.0,
            stored.least or 0,
            stored.alphabet or 0,
            _encoding(encoding),
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): copy the whole folder") from error
    except ValueError as error:
        reason = _first(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{path}: {reason}: copy or build the tokenizer anew") from error


def _read(path: Path) -> _Stored:
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise ValueError(f"format={found!r}, this version reads format {FORMAT}")
    return _Stored.model_validate_json(text)


def _encoding(text: str) -> Tokenizer:
    try:
        encoding = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"not a byte-pair encoding ({error})") from error
    stages = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    if any(getattr(encoding, stage) is not None for stage in stages) or encoding.get_added_tokens_decoder():
        raise ValueError("it does more than byte-pair encoding")
    return encoding


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return ".".join(map(str, first["loc"])) + (": " if first["loc"] else "") + first["msg"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""Whether the pictures of an answer are those that were asked for: the same as in every answer before."""

import base64
import binascii
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class Asked:
    """What a request asks for; `body` is its JSON."""

    label: int
    steps: int
    guidance_scale: float
    seed: int
    images: int = 1
    model: str | None = None

    def body(self) -> dict[str, Any]:
        """Return the request in the form of OpenAI's images API, with this project's additional fields."""
        named = {} if self.model is None else {"model": self.model}
        return named | {
            "class_label": self.label,
            "n": self.images,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "response_format": "b64_json",
        }


class Answers:
    """Digests of all pictures seen; the first answer to a question is taken for the right one."""

    def __init__(self, known: dict[str, str] | None = None) -> None:
        """Start from digests that are known, as `digests` of an earlier load."""
        self.digests = dict(known or {})
        self._encoded: dict[bytes, str] = {}

    def fault(self, asked: Asked, version: str, answer: Any) -> str:
        """Return what is wrong with the JSON of an answer by a model's `version`, or an empty text."""
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            return "no data"
        data = answer["data"]
        if len(data) != asked.images:
            return "number of images"
        if answer.get("seed") != asked.seed:
            return "seed"
        for k, item in enumerate(data):
            try:
                digest = self._digest(item["b64_json"])
            except (KeyError, TypeError, ValueError, UnidentifiedImageError):
                return "not a picture"
            if self.digests.setdefault(_question(asked, version, k), digest) != digest:
                return "other pixels"
        return ""

    def _digest(self, text: str) -> str:
        """Return the digest of the pixels; a text that was seen before is not decoded again."""
        encoding = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if encoding not in self._encoded:
            pixels = decoded(text)
            named = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=16)
            named.update(pixels.tobytes())
            self._encoded[encoding] = named.hexdigest()
        return self._encoded[encoding]


def decoded(text: str) -> np.ndarray:
    """Return the picture uint8 [H,W] or [H,W,3] of a base64 text; ValueError if it is none."""
    try:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(text, validate=True))))
    except (binascii.Error, OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"not a picture: {error}") from error


def read_known(path: Path) -> dict[str, str]:
    """Return the digests that a load has left; none if there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _question(asked: Asked, version: str, index: int) -> str:
    """Return all that a picture may depend on; the number of images asked for is not among it."""
    return json.dumps(
        (asked.model, version, asked.label, asked.steps, asked.guidance_scale, asked.seed, index)
    )

"""Observations as clients send them, in JSON or in openpi's frames, and as policies see them."""

import binascii
import math
from base64 import b64decode
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from counterpoint.policies.observation import Observation, ObservationSpace

LONGEST_INSTRUCTION = 2000
"""Characters."""
MOST_STATE, MOST_CAMERAS = 1024, 16
DATA_URL = "data:image/png;base64,"


class RawImage(BaseModel):
    """An image by its bytes."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    shape: Annotated[list[Annotated[int, Field(ge=1, le=65535)]], Field(min_length=3, max_length=3)] = Field(
        examples=[[64, 64, 3]]
    )
    """Height, width and 3."""
    dtype: Literal["uint8"] = Field(examples=["uint8"])
    """The only one there is."""
    data: str = Field(examples=["AAAA"])
    """The bytes in C order, in base64."""


def _form(value: Any) -> str:
    return "raw" if isinstance(value, dict | RawImage) else "png"


Sent = Annotated[Annotated[str, Tag("png")] | Annotated[RawImage, Tag("raw")], Discriminator(_form)]
Entry = Annotated[float, Field(allow_inf_nan=False)]


class ObservationBody(BaseModel):
    """One moment as a robot's sensors and its user give it; GET /v1/models/{id} says what is expected."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    images: Annotated[dict[str, Sent], Field(min_length=1, max_length=MOST_CAMERAS)] = Field(
        examples=[{"top": "iVBORw0KGgo="}]
    )
    """By camera: an RGB PNG in base64, with or without "data:image/png;base64," before it, or its bytes."""
    state: Annotated[list[Entry], Field(max_length=MOST_STATE)] | None = Field(None, examples=[[0.4, 0.6]])
    """Proprioceptive state; empty or left out for policies without."""
    instruction: Annotated[str, Field(max_length=LONGEST_INSTRUCTION)] = Field(
        examples=["push the red block to the corner"]
    )
    """What the robot shall do."""


def observation_of(body: ObservationBody, space: ObservationSpace) -> Observation:
    """Return what a policy of `space` shall see.

    Only images of the right size are decoded. Raises ValueError, in one line, for what is broken or misfits.
    """
    strangers = [camera for camera in body.images if camera not in space.cameras]
    if strangers:
        raise ValueError(
            f"observation.images has camera {strangers[0][:60]!r}, which the policy lacks: "
            f"give images of {sorted(space.cameras)} only"
        )
    images = {}
    for camera, sent in body.images.items():
        where = f"observation.images[{camera!r}]"
        size = tuple(space.cameras[camera])
        images[camera] = _decoded(sent, size, where) if isinstance(sent, str) else _copied(sent, where)
    observation = Observation(images, _numbers(body.state or []), body.instruction)
    space.check(observation)
    return observation


class ObservationKeys:
    """Under which keys of openpi's observation maps a policy's cameras, state and instruction are found.

    The first camera is also "observation/image" and "image". A camera is its name after "observation/", with
    or without "_image" behind, and in a map "images". The state is "observation/state" or "state", the
    instruction "prompt". Images may be [H,W,3] or [3,H,W].

    Args:
        space: what the policy expects.
        extra: from further keys to camera names, "state" or "prompt"; "images/KEY" is KEY in the map
            "images". Several keys of the state are put together in their order.
    """

    def __init__(self, space: ObservationSpace, extra: Mapping[str, str]) -> None:
        """Raises ValueError, in one line, if `extra` names a camera that the policy lacks."""
        self.space = space
        first = next(iter(space.cameras))
        self.cameras = {"observation/image": first, "image": first}
        for camera in space.cameras:
            for key in (f"observation/{camera}_image", f"observation/{camera}", f"images/{camera}"):
                self.cameras[key] = camera
        self.cameras |= {key: camera for key, camera in extra.items() if camera in space.cameras}
        self.state = ["observation/state", "state", *(key for key, what in extra.items() if what == "state")]
        self.prompt = ["prompt", *(key for key, what in extra.items() if what == "prompt")]
        for key, what in extra.items():
            if what not in (*space.cameras, "state", "prompt"):
                raise ValueError(
                    f"actions.models: keys: {key!r} stands for {what!r}: give state, prompt or one of "
                    f"{sorted(space.cameras)}"
                )

    @property
    def known(self) -> list[str]:
        """All keys that are understood."""
        return [*self.cameras, *self.state, *self.prompt]

    def read(self, content: Mapping[Any, Any]) -> Observation:
        """Return the observation in a map; keys that are not known are passed over.

        Raises ValueError, in one line, for what misfits.
        """
        parts = dict(content)
        nested = parts.get("images")
        if isinstance(nested, Mapping):
            parts |= {f"images/{key}": image for key, image in nested.items()}
        images: dict[str, np.ndarray] = {}
        for key, camera in self.cameras.items():
            if key in parts:
                if camera in images:
                    raise ValueError(f"{key!r} and another key both show camera {camera!r}: send one of them")
                images[camera] = _upright(parts[key], key)
        states = [_numbers(parts[key], key) for key in self.state if key in parts]
        prompts = [parts[key] for key in self.prompt if key in parts]
        prompt = prompts[0] if prompts else ""
        if not isinstance(prompt, str) or len(prompt) > LONGEST_INSTRUCTION:
            raise ValueError(f"prompt is no text of at most {LONGEST_INSTRUCTION} characters: send one")
        state = np.concatenate(states) if states else np.zeros(0, np.float32)
        observation = Observation(images, state, str(prompt))
        self.space.check(observation)
        return observation


def _decoded(text: str, size: Sequence[int], where: str) -> np.ndarray:
    """Return a PNG's pixels, uint8 [H,W,3]; of another size than `size` [H,W] none are read, all are zero."""
    if text[:5].lower() == "data:":
        if text[: len(DATA_URL)].lower() != DATA_URL:
            raise ValueError(f"{where} is a data URL of another kind: begin it with {DATA_URL}")
        text = text[len(DATA_URL) :]
    try:
        picture = Image.open(BytesIO(_bytes(text, where)), formats=("PNG",))
        width, height = picture.size
        if (height, width) != tuple(size):
            # Takes no memory, and `ObservationSpace.check` refuses it by its shape.
            return np.broadcast_to(np.uint8(0), (height, width, 3))
        if picture.mode != "RGB":
            raise _MisfitError(f"{where} is a PNG of mode {picture.mode}: convert it to RGB")
        picture.load()
        return np.asarray(picture)
    except _MisfitError:
        raise
    except Exception:  # Pillow raises many kinds for broken files, those too large to open included
        raise ValueError(f"{where} is no PNG that can be read: send an RGB PNG in base64") from None


def _copied(sent: RawImage, where: str) -> np.ndarray:
    data = _bytes(sent.data, f"{where}.data")
    if math.prod(sent.shape) != len(data):
        raise ValueError(
            f"{where}.data has {len(data)} bytes, uint8 {sent.shape} takes {math.prod(sent.shape)}: "
            "send all pixels in C order"
        )
    return np.frombuffer(data, np.uint8).reshape(sent.shape)


class _MisfitError(ValueError):
    """What is wrong with an image, in words for the client."""


def _bytes(text: str, where: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _MisfitError(f"{where} is not base64: encode it without line breaks") from None


def _upright(image: Any, key: str) -> np.ndarray:
    """Return an image [H,W,3] as it is, and one [3,H,W] with its channels last."""
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{key!r} is no array: send an image as numpy uint8 [H,W,3] or [3,H,W]")
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    return image


def _numbers(values: Any, key: str = "state") -> np.ndarray:
    """Return numbers as float32 [D]; those too large for it become infinite, which no policy takes."""
    try:
        numbers = np.asarray(values if len(np.shape(values)) else [values])
    except ValueError:  # lists of different lengths
        numbers = np.asarray([""])
    if numbers.size and numbers.dtype.kind not in "biuf":
        raise ValueError(f"{key!r} holds no numbers: send a list or array of them")
    if numbers.size > MOST_STATE:
        raise ValueError(f"{key!r} has {numbers.size} entries: send at most {MOST_STATE}")
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32).reshape(-1)

"""WebSocket frames as openpi's clients and servers exchange them: MessagePack maps with numpy arrays inside.

The encoding is that of openpi_client.msgpack_numpy (github.com/Physical-Intelligence/openpi): an array is a
map of `__ndarray__`, `data` (bytes in C order), `dtype` (such as "<f4") and `shape`, a numpy scalar one of
`__npgeneric__`, `data` and `dtype`; the keys of both are bytes. Nothing is ever unpickled.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

REFUSED_KINDS = "VOc"
"""Kinds of dtype that openpi refuses: records and raw memory, objects, complex numbers."""
DTYPE = re.compile(r"[<>|=]?[biufSUmM][1-9][0-9]{0,5}(\[[0-9]{0,6}[A-Za-z]{1,2}\])?")
"""What `numpy.dtype.str` looks like for all other kinds; items have at least a byte."""
MOST_DIMENSIONS, MOST_ENTRIES, MOST_KEYS = 8, 1024, 256
"""Of an array, a list and a map. MessagePack reserves memory for as many as a frame says that it holds."""
MOST_PARTS = 65536
"""Entries of all lists and maps of a frame: a byte can stand for an object of a hundred bytes."""


def pack(content: Any) -> bytes:
    """Return a frame of `content`: maps, lists, text, numbers, None, numpy arrays and scalars.

    Raises ValueError for a dtype that the encoding lacks, and TypeError for what else cannot be packed.
    """
    packed: bytes = msgpack.packb(content, default=_envelope)
    return packed


def unpack(frame: bytes, max_bytes: int) -> dict[str | bytes, Any]:
    """Return the map that a frame of at most `max_bytes` holds; its arrays are read-only views.

    Takes memory in proportion to the frame whatever that claims to hold. Raises ValueError, in one line, for
    all that is not such a frame.
    """
    if len(frame) > max_bytes:
        raise ValueError(f"the frame has {len(frame)} bytes: send at most {max_bytes}")
    count = _Count()
    try:
        content = msgpack.unpackb(
            frame, object_hook=count.map, list_hook=count.list, ext_hook=_no_extension, raw=False,
            strict_map_key=True, max_array_len=MOST_ENTRIES, max_map_len=MOST_KEYS, max_ext_len=0,
        )  # fmt: skip
    except _RefusedError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # msgpack raises many kinds for broken frames
        reason = " ".join(str(error).split())[:120] or "it is broken"
        raise ValueError(f"the frame is not MessagePack as openpi's clients send it ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError("the frame holds no map: send one, with the observation's parts by their keys")
    return content


class _RefusedError(ValueError):
    """What is wrong with a part of a frame, in words for the client."""


class _Count:
    """Opens what `msgpack` has read, as long as it is not too much."""

    def __init__(self) -> None:
        self.left = MOST_PARTS

    def list(self, content: list[Any]) -> list[Any]:
        """Return a list that was read."""
        self._spend(len(content))
        return content

    def map(self, content: dict[Any, Any]) -> Any:
        """Return a map that was read, or the array or scalar that it stands for."""
        self._spend(len(content))
        if b"__ndarray__" in content:
            return _array(content)
        return _scalar(content) if b"__npgeneric__" in content else content

    def _spend(self, entries: int) -> None:
        self.left -= entries + 1
        if self.left < 0:
            raise _RefusedError(f"the frame has more than {MOST_PARTS} parts: send numbers as numpy arrays")


def _envelope(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in REFUSED_KINDS:
        raise ValueError(f"dtype {value.dtype} cannot be sent: use numbers, truth values or text")
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape,
        }  # fmt: skip
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _array(content: Mapping[Any, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(content), content.get(b"data"), content.get(b"shape")
    if not isinstance(data, bytes):
        raise _RefusedError("an array's data are no bytes: send its bytes in C order")
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_is_length, shape)):
        raise _RefusedError(f"an array's shape is no list of at most {MOST_DIMENSIONS} lengths")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise _RefusedError(f"an array of shape {shape} and dtype {dtype.str} cannot have {len(data)} bytes")
    try:
        return np.ndarray(shape, dtype, data)
    except ValueError:  # a length of 0 beside large ones
        raise _RefusedError(f"an array of shape {shape} is too large") from None


def _scalar(content: Mapping[Any, Any]) -> Any:
    dtype, data = _dtype(content), content.get(b"data")
    if not isinstance(data, bool | int | float | str | bytes):
        raise _RefusedError("a numpy scalar's data are neither number nor text")
    try:
        with np.errstate(all="ignore"):
            return dtype.type(data)
    except Exception:  # numpy raises many kinds for values that a type cannot have
        raise _RefusedError(f"a numpy scalar's data do not fit dtype {dtype.str}") from None


def _dtype(content: Mapping[Any, Any]) -> np.dtype[Any]:
    name = content.get(b"dtype")
    if not isinstance(name, str) or not DTYPE.fullmatch(name):
        raise _RefusedError(f"dtype {str(name)[:40]!r} is refused: send numbers, truth values or text")
    try:
        return np.dtype(name)
    except TypeError:
        raise _RefusedError(f"dtype {name!r} is unknown to numpy") from None


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _no_extension(code: int, data: bytes) -> Any:
    raise _RefusedError("MessagePack extensions are refused: send maps, lists, text, numbers, numpy arrays")

"""Frames are byte for byte openpi's, and no frame, however hostile, costs more than it weighs."""

import contextlib
import tracemalloc

import msgpack
import numpy as np
import openpi_client
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.serving.frames import pack, unpack

ROOM = 8 * 2**20
ACTIONS = bytes.fromhex(
    "81a7616374696f6e7384c40b5f5f6e6461727261795f5fc3c40464617461c40c000000000000803f00000040"
    "c4056474797065a33c6634c40573686170659103"
)
"""{"actions": float32 [0, 1, 2]}, as openpi's packer gives it."""
SCALAR = bytes.fromhex(
    "83c40d5f5f6e7067656e657269635f5fc3c40464617461cb3ff8000000000000c4056474797065a33c6634"
)
"""float32(1.5)."""
LIBERO = {
    "observation/image": np.arange(224 * 224 * 3).reshape(224, 224, 3).astype(np.uint8),
    "observation/wrist_image": np.zeros((224, 224, 3), np.uint8),
    "observation/state": np.linspace(0, 1, 8),
    "prompt": "pick up the black bowl",
}
CONTENTS = [
    LIBERO,
    {"images": {"cam_high": np.zeros((3, 4, 5), np.uint8)}, "state": np.ones(14, np.float32), "n": None},
    {
        "flag": np.True_,
        "half": np.float16(0.5),
        "count": np.int64(-3),
        "empty": np.zeros((0, 3)),
        "text": "é",
    },
    {
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(9)[::2],
        "one": np.array(4),
    },
    {"big": np.arange(3, dtype=">i4"), "words": np.array(["a", "bcd"]), "when": np.array([7], "M8[ns]")},
]


def test_bytes_are_those_of_openpi() -> None:
    assert pack({"actions": np.array([0, 1, 2], np.float32)}) == ACTIONS
    assert pack(np.float32(1.5)) == SCALAR
    assert np.array_equal(unpack(ACTIONS, ROOM)["actions"], np.array([0, 1, 2], np.float32))


@pytest.mark.parametrize("content", CONTENTS)
def test_what_openpi_packs_is_understood_and_the_other_way_round(content: dict) -> None:
    assert pack(content) == openpi_client.packb(content)
    for ours, theirs in (
        (unpack(openpi_client.packb(content), ROOM), content),
        (openpi_client.unpackb(pack(content)), content),
    ):
        np.testing.assert_equal(ours, theirs)
        for name, value in theirs.items():
            assert type(ours[name]) is type(value)
            assert getattr(ours[name], "dtype", None) == getattr(value, "dtype", None)


def test_arrays_are_read_only_views_of_the_frame() -> None:
    image = unpack(pack(LIBERO), ROOM)["observation/image"]
    assert not image.flags.writeable
    assert isinstance(image.base, bytes)
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 1


@pytest.mark.parametrize(
    "value", [np.zeros(1, "c8"), np.complex64(1), np.zeros(1, object), np.zeros(1, "V4")]
)
def test_kinds_that_openpi_refuses_are_refused_on_both_sides(value: object) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        pack({"x": value})


def array(**changes: object) -> bytes:
    """A frame with a float32 array of one entry, some of whose envelope is another."""
    fields = {"__ndarray__": True, "data": b"1234", "dtype": "<f4", "shape": [1]} | changes
    return msgpack.packb({"a": {name.encode(): value for name, value in fields.items()}})


def scalar(data: object, dtype: object) -> bytes:
    return msgpack.packb({"a": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


def nested(inner: bytes, width: int, count: int) -> bytes:
    """`count` lists in a list, of `width` times `inner` each."""
    row = b"\xdc" + width.to_bytes(2, "big") + inner * width
    return b"\x81\xa1a\xdc" + count.to_bytes(2, "big") + row * count


HOSTILE = [
    (array(shape=[2**40]), "shape"),
    (array(shape=[2**31 - 1] * 3 + [0], data=b""), "too large"),
    (array(shape=[-1]), "shape"),
    (array(shape=[True]), "shape"),
    (array(shape=[1.0]), "shape"),
    (array(shape=[1] * 9), "shape"),
    (array(shape="1"), "shape"),
    (array(shape=[2]), "cannot have 4 bytes"),
    (array(shape=[]) + b"\x00", "extra data"),
    (array(data="1234"), "bytes"),
    (array(data=[1, 2]), "bytes"),
    (array(dtype="O"), "dtype 'O' is refused"),
    (array(dtype="|V4"), "refused"),
    (array(dtype="<c8", data=b"12345678"), "refused"),
    (array(dtype="f4,f4"), "refused"),
    (array(dtype="S0", data=b""), "refused"),
    (array(dtype="<f3"), "unknown"),
    (array(dtype="i4" + " " * 10**6), "refused"),
    (array(dtype=4), "refused"),
    (array(dtype=b"<f4"), "refused"),
    (scalar(300, "|i1"), "do not fit"),
    (scalar("9" * 100_000, "<i8"), "do not fit"),
    (scalar([1], "<f4"), "neither number nor text"),
    (scalar(None, "<f4"), "neither number nor text"),
    (msgpack.packb({b"__npgeneric__": 1}), "refused"),
    (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "xten|ext_len"),
    (b"\x81\xa1a\xc7\x00\x05", "extensions"),
    (b"\x81\xa1a\xc7\x00\xff", "not MessagePack"),
    (msgpack.packb({"a": msgpack.Timestamp(5)}), "not MessagePack"),
    (b"\x81\xa1a" + b"\x91" * 100_000, "not MessagePack"),
    (b"\x81\xa1a" + b"\xdc\x04\x00" * 100_000, "not MessagePack"),
    (b"\x81\xa1a\xdd\xff\xff\xff\xff", "max_array_len"),
    (b"\xdf\xff\xff\xff\xff", "max_map_len"),
    (b"\x81\xa1a\xc6\xff\xff\xff\xff", "not MessagePack"),
    (nested(b"\x80", 1024, 1000), "more than 65536 parts"),
    (nested(b"\x90", 1024, 1000), "more than 65536 parts"),
    (nested(b"\xc0", 1024, 1000), "more than 65536 parts"),
    (msgpack.packb({1: 2}, strict_types=True), "not allowed for map key"),
    (b"\x81\x91\x01\x01", "not allowed for map key"),
    (b"\x81\xa1a\xa1\xff", "utf-8"),
    (msgpack.packb([1]), "no map"),
    (msgpack.packb(5), "no map"),
    (SCALAR, "no map"),
    (b"", "incomplete"),
    (b"\xc1", "not MessagePack"),
    (ACTIONS[:-1], "incomplete"),
    (b"\x80" * (ROOM + 1), "send at most"),
    (b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix", "not MessagePack"),  # a pickle
]


@pytest.mark.parametrize(("frame", "words"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_frame_is_refused_in_one_line_and_in_little_memory(frame: bytes, words: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=words) as raised:
            unpack(frame, ROOM)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250
    assert peak < 16 * 2**20 + 4 * len(frame)


@given(st.binary(max_size=300) | st.builds(lambda i, b: ACTIONS[:i] + b + ACTIONS[i + len(b) :],
                                           st.integers(0, 63), st.binary(max_size=4)))  # fmt: skip
@example(b"\x81\xa1a\xd4\xff\x00")
def test_any_bytes_are_a_map_or_a_value_error(frame: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(unpack(frame, ROOM), dict)

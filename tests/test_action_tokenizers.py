"""Action tokenizers: against naive references, round trips, and files that do not fit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer
from tokenizers.models import BPE

from counterpoint.actions.config import (
    TokenizerConfig,
    Undecodable,
    build_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from counterpoint.actions.fast import FastTokenizer
from counterpoint.actions.uniform import UniformTokenizer

H, D = 6, 3


def smooth(chunks: int, seed: int = 0) -> np.ndarray:
    """Return chunks that move evenly, as a robot's do, in units that differ by dimension."""
    rng = np.random.default_rng(seed)
    start, speed = rng.normal(size=(2, chunks, 1, D))
    time = np.arange(H)[None, :, None] / H
    return (start + speed * time + 0.05 * rng.normal(size=(chunks, H, D))) * [1.0, 40.0, 0.01] + [0, 5, 0]


UNIFORM = build_tokenizer(TokenizerConfig(bins=32), smooth(300), "demos-1")
FAST = build_tokenizer(TokenizerConfig(kind="fast", vocab_size=300), smooth(300), "demos-1")
assert isinstance(UNIFORM, UniformTokenizer)
assert isinstance(FAST, FastTokenizer)
ANY = arrays(np.float64, (1, H, D), elements=st.floats(-60, 60, width=32))


def naive_uniform_token(value: float, low: float, high: float, bins: int) -> int:
    """Return OpenVLA's bin of one value, counted from zero, by walking over the edges."""
    scaled = min(max(2 * (value - low) / (high - low) - 1, -1.0), 1.0)
    return sum(1 for edge in np.linspace(-1, 1, bins) if scaled >= edge) - 1


def test_uniform_tokens_are_those_of_a_walk_over_the_edges() -> None:
    actions = smooth(20, seed=1)
    low, high = UNIFORM.statistics.low, UNIFORM.statistics.high
    for chunk, tokens in zip(actions, UNIFORM.encode(actions), strict=True):
        expected = [naive_uniform_token(chunk[h, d], low[d], high[d], 32) for h in range(H) for d in range(D)]
        assert tokens == expected
    assert (UNIFORM.vocab_size, UNIFORM.end_token, UNIFORM.max_tokens) == (32, None, H * D)


def test_uniform_decodes_to_the_middles_of_the_intervals() -> None:
    low, high = np.array(UNIFORM.statistics.low), np.array(UNIFORM.statistics.high)
    for token, middle in ((0, -1 + 1 / 31), (30, 1 - 1 / 31), (31, 1 - 1 / 31)):
        expected = np.tile((middle + 1) / 2 * (high - low) + low, (H, 1))
        np.testing.assert_allclose(UNIFORM.decode([token] * H * D), expected)


@settings(max_examples=25, deadline=None)
@given(ANY)
def test_uniform_is_off_by_at_most_half_a_bin_within_the_range(actions: np.ndarray) -> None:
    low, high = np.array(UNIFORM.statistics.low), np.array(UNIFORM.statistics.high)
    decoded = UNIFORM.decode(UNIFORM.encode(actions)[0])
    assert (np.abs(decoded - np.clip(actions[0], low, high)) <= (high - low) / 31 / 2 * (1 + 1e-9)).all()
    again = UNIFORM.encode(decoded[None])
    np.testing.assert_allclose(UNIFORM.decode(again[0]), decoded, atol=1e-12)


def naive_coefficients(chunk: np.ndarray, tokenizer: FastTokenizer) -> list[int]:
    """Return FAST's integers of one chunk [H,D] from the sum that defines the orthonormal DCT-II."""
    x = tokenizer.statistics.normalise(chunk)
    found = []
    for k in range(H):
        norm = math.sqrt((1 if k == 0 else 2) / H)
        for d in range(D):
            total = sum(x[n, d] * math.cos(math.pi * k * (2 * n + 1) / (2 * H)) for n in range(H))
            found.append(round(norm * total * tokenizer.scale))
    return found


def integers(tokenizer: FastTokenizer, tokens: list[int]) -> list[int]:
    """Return the integers that `tokens` stand for."""
    characters = "".join(tokenizer.bpe.id_to_token(token) or "" for token in tokens)
    return [ord(character) - 0x4E00 + tokenizer.least for character in characters]


def test_fast_writes_rounded_cosine_coefficients_lowest_frequency_of_all_dimensions_first() -> None:
    actions = smooth(300)[:20]
    for chunk, tokens in zip(actions, FAST.encode(actions), strict=True):
        assert integers(FAST, tokens) == naive_coefficients(chunk, FAST)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 299), st.floats(0.0, 1.0))
def test_fast_is_off_by_no_more_than_rounding_allows(chunk: int, share: float) -> None:
    data = smooth(300)
    # Between two chunks of the data no coefficient leaves the data's range.
    actions = share * data[chunk] + (1 - share) * data[0]
    decoded = FAST.decode(FAST.encode(actions[None])[0])
    error = FAST.statistics.normalise(decoded) - FAST.statistics.normalise(actions)
    # The transform keeps lengths: H coefficients of one dimension are each off by half a unit at most.
    assert (np.linalg.norm(error, axis=0) <= math.sqrt(H) * 0.5 / FAST.scale + 1e-9).all()


@settings(max_examples=25, deadline=None)
@given(ANY)
def test_fast_clamps_coefficients_that_its_data_lacked(actions: np.ndarray) -> None:
    tokens = FAST.encode(actions)[0]
    wanted = np.array(naive_coefficients(actions[0], FAST))
    got = np.array(integers(FAST, tokens))
    top = FAST.least + FAST.alphabet - 1
    # The reference rounds in another order of sums: a coefficient on the very edge may differ by one.
    assert (np.abs(got - np.clip(wanted, FAST.least, top)) <= 1).all()
    assert np.isfinite(FAST.decode(tokens)).all()
    assert len(tokens) < FAST.max_tokens


def test_fast_is_shorter_than_uniform_on_smooth_motion_and_ends_with_its_last_token() -> None:
    lengths = [len(tokens) for tokens in FAST.encode(smooth(300))]
    assert np.mean(lengths) < 0.7 * H * D
    assert len(set(lengths)) > 1
    assert FAST.end_token == FAST.vocab_size - 1 == 299
    assert FAST.max_tokens == H * D + 1
    tokens = FAST.encode(smooth(1))[0]
    assert FAST.decode([*tokens, FAST.end_token]).tolist() == FAST.decode(tokens).tolist()


def test_the_same_data_train_the_same_encoding() -> None:
    config = TokenizerConfig(kind="fast", vocab_size=300)
    again = build_tokenizer(config, smooth(300).copy(), "demos-1")
    assert isinstance(again, FastTokenizer)
    assert again.bpe.to_str() == FAST.bpe.to_str()
    other = build_tokenizer(config, smooth(300, seed=5), "demos-1")
    assert isinstance(other, FastTokenizer)
    assert other.bpe.to_str() != FAST.bpe.to_str()


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "message"),
    [
        (UNIFORM, [0] * (H * D - 1), "17 tokens are not the 18"),
        (UNIFORM, [0] * (H * D - 1) + [32], "token 32 is outside the 32"),
        (UNIFORM, [-1] + [0] * (H * D - 1), "token -1"),
        (UNIFORM, [0.5] * (H * D), "float64"),
        (FAST, [], "stand for 0 coefficients"),
        (FAST, [0] * (H * D - 1), "17 coefficients, a chunk has 18"),
        (FAST, [0] * (H * D + 1), "19 coefficients"),
        (FAST, [0, 299, *[0] * (H * D - 1)], "before the end"),
        (FAST, [*[0] * (H * D), 299, 299], "before the end"),
        (FAST, [300] * (H * D), "token 300 is outside"),
    ],
)
def test_tokens_that_are_no_chunk_are_undecodable(
    tokenizer: UniformTokenizer | FastTokenizer, tokens: list[int], message: str
) -> None:
    with pytest.raises(Undecodable, match=message):
        tokenizer.decode(tokens)


def test_actions_that_are_no_chunks_are_refused() -> None:
    for tokenizer in (UNIFORM, FAST):
        with pytest.raises(ValueError, match=r"\[4, 5, 3\], the tokenizer takes \[B, 6, 3\]"):
            tokenizer.encode(np.zeros((4, 5, 3)))
        with pytest.raises(ValueError, match=r"not finite in dimensions \[1\]"):
            tokenizer.encode(np.array([[[0, np.nan, 0]] * H]))
    for kind in ("uniform", "fast"):
        config = TokenizerConfig.model_validate({"kind": kind})
        with pytest.raises(ValueError, match="not empty"):
            build_tokenizer(config, np.zeros((0, H, D)), "x")
        with pytest.raises(ValueError, match="not finite"):
            build_tokenizer(config, np.full((2, H, D), np.nan), "x")
    with pytest.raises(ValueError, match=r"vocab_size=40 cannot hold the \d+ coefficients"):
        build_tokenizer(TokenizerConfig(kind="fast", vocab_size=40), smooth(300), "x")


@pytest.mark.parametrize("tokenizer", [UNIFORM, FAST], ids=["uniform", "fast"])
def test_what_is_saved_is_what_is_loaded(tokenizer: UniformTokenizer | FastTokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path / "new" / "policy")
    loaded = load_tokenizer(tmp_path / "new" / "policy")
    assert type(loaded) is type(tokenizer)
    actions = smooth(50, seed=9)
    assert loaded.encode(actions) == tokenizer.encode(actions)
    tokens = tokenizer.encode(actions)[0]
    assert loaded.decode(tokens).tolist() == tokenizer.decode(tokens).tolist()
    assert loaded.statistics == tokenizer.statistics
    assert (loaded.vocab_size, loaded.end_token) == (tokenizer.vocab_size, tokenizer.end_token)
    assert all(file.suffix == ".json" for file in (tmp_path / "new" / "policy").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format=2, this version reads format 1"),
        ({"horizon": 0}, "horizon"),
        ({"kind": "uniform"}, "kind uniform"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"scale": math.nan}, "scale"),
        ({"alphabet": 3}, "not over the 3 characters"),
        ({"bpe_sha256": "0" * 64}, "not the file that action_tokenizer.json was saved with"),
        ({"surprise": 1}, "surprise"),
        ({"statistics": {}}, "statistics.low"),
    ],
)
def test_files_that_were_changed_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    save_tokenizer(FAST, tmp_path)
    path = tmp_path / "action_tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("file", ["action_tokenizer.json", "action_bpe.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe", b'{"format": 1}'])
def test_files_that_are_missing_or_corrupt_are_refused(
    file: str, content: bytes | None, tmp_path: Path
) -> None:
    save_tokenizer(FAST, tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_encoding_of_other_characters_is_refused_even_if_its_sum_is_right() -> None:
    foreign = Tokenizer(BPE({"a": 0, "b": 1}, []))
    with pytest.raises(ValueError, match="not over the 2 characters"):
        FastTokenizer(FAST.statistics, H, 10.0, 0, 2, foreign)
    gaps = Tokenizer(BPE({"一": 0, "丁": 5}, []))
    with pytest.raises(ValueError, match="gaps"):
        FastTokenizer(FAST.statistics, H, 10.0, 0, 2, gaps)

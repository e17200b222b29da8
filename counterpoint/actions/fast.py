"""FAST: chunks of actions as compressed frequencies (arXiv 2501.09747, sec. IV-V).

A chunk is scaled by quantiles, turned into cosine coefficients along time, rounded, written lowest frequency
first and compressed by byte-pair encoding. Tokens are few where motion is smooth, their number varies, and
not every sequence of tokens is a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import dct, idct
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from counterpoint.actions.statistics import ActionStatistics, check_chunks
from counterpoint.actions.tokenizer import Undecodable, check_tokens

FIRST_CHARACTER = 0x4E00
"""The least coefficient is written as this character: from here on, 20,992 stand in one block."""
MAX_VOCABULARY = 20_992


@dataclass(frozen=True)
class FastTokenizer:
    """Tokens of the byte-pair encoding, and after them one that ends a chunk."""

    statistics: ActionStatistics
    """Range of each dimension."""
    horizon: int
    """Control steps of a chunk (H)."""
    scale: float
    """Coefficients are multiplied by this before they are rounded: the larger, the finer and the longer."""
    least: int
    """Least rounded coefficient that can be written."""
    alphabet: int
    """How many consecutive coefficients can be written, from `least` on; others are clamped to them."""
    bpe: Tokenizer
    """The byte-pair encoding over the alphabet's characters."""

    def __post_init__(self) -> None:
        if self.horizon < 1 or not 0 < self.scale < np.inf or not 0 < self.alphabet <= MAX_VOCABULARY:
            raise ValueError(
                f"horizon={self.horizon} must be at least 1, scale={self.scale} positive and "
                f"alphabet={self.alphabet} in [1, {MAX_VOCABULARY}]"
            )
        entries = self.bpe.get_vocab()
        characters = set(_alphabet(self.alphabet))
        if not isinstance(self.bpe.model, BPE) or sorted(entries.values()) != list(range(len(entries))):
            raise ValueError("the byte-pair encoding has gaps in its vocabulary: train it anew")
        if not characters <= set(entries) or any(set(entry) - characters for entry in entries):
            raise ValueError(
                f"the byte-pair encoding is not over the {self.alphabet} characters of the alphabet: "
                "use the one that was trained with it"
            )

    @classmethod
    def train(
        cls, statistics: ActionStatistics, actions: np.ndarray, scale: float = 10.0, vocab_size: int = 1024
    ) -> "FastTokenizer":
        """Learn the encoding from chunks of `actions` [F,H,D]; the same data give the same tokenizer.

        The alphabet spans the data's coefficients; `vocab_size` counts it, the merges and the end token, and
        is not reached where the data have too few pairs. Raises ValueError if the alphabet alone exceeds it.
        """
        if np.ndim(actions) != 3 or 0 in np.shape(actions):
            raise ValueError(f"actions have shape {list(np.shape(actions))}: give chunks [F,H,D], not empty")
        actions = check_chunks(actions, np.shape(actions)[1], statistics.dimensions)
        coefficients = _coefficients(statistics.normalise(actions), scale)
        least = int(coefficients.min())
        alphabet = int(coefficients.max()) - least + 1
        if alphabet >= vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} cannot hold the {alphabet} coefficients of these actions "
                "and an end token: raise it, lower tokenizer.scale, or take wider quantiles"
            )
        bpe = Tokenizer(BPE())
        trainer = BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=_alphabet(alphabet), show_progress=False
        )
        bpe.train_from_iterator(_texts(coefficients - least), trainer)
        return cls(statistics, actions.shape[1], float(scale), least, alphabet, bpe)

    @property
    def vocab_size(self) -> int:
        """Action tokens V, the end token included."""
        return self.bpe.get_vocab_size() + 1

    @property
    def end_token(self) -> int:
        """The last token."""
        return self.vocab_size - 1

    @property
    def max_tokens(self) -> int:
        """H*D+1: in the worst case each coefficient is a token of its own, and then comes the end token."""
        return self.horizon * self.statistics.dimensions + 1

    def encode(self, actions: np.ndarray) -> list[list[int]]:
        """Return the tokens of each chunk of `actions` [B,H,D], without the end token.

        A coefficient beyond those of the training data is clamped to the alphabet. Raises ValueError if the
        actions have another shape or are not finite.
        """
        actions = check_chunks(actions, self.horizon, self.statistics.dimensions)
        coefficients = _coefficients(self.statistics.normalise(actions), self.scale)
        texts = _texts(np.clip(coefficients - self.least, 0, self.alphabet - 1))
        return [encoding.ids for encoding in self.bpe.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the chunk float64 [H,D]; raises Undecodable unless there are exactly H*D coefficients.

        An end token may stand at the end, and nowhere else.
        """
        array = check_tokens(tokens, self.vocab_size)
        if array.size and array[-1] == self.end_token:
            array = array[:-1]
        if self.end_token in array:
            raise Undecodable(f"the end token {self.end_token} stands before the end")
        text = "".join(self.bpe.id_to_token(int(token)) or "" for token in array)
        size = self.horizon * self.statistics.dimensions
        if len(text) != size:
            raise Undecodable(f"the tokens stand for {len(text)} coefficients, a chunk has {size}")
        shifted = np.array([ord(character) - FIRST_CHARACTER for character in text])
        coefficients = (shifted + self.least).reshape(self.horizon, -1) / self.scale
        return self.statistics.unnormalise(idct(coefficients, axis=0, norm="ortho"))


def _coefficients(scaled: np.ndarray, scale: float) -> np.ndarray:
    """Return the rounded cosine coefficients (DCT-II along time) of [B,H,D], int64, low frequencies first."""
    # Beyond this no alphabet could hold them, and the conversion to int64 must not overflow.
    return np.clip(np.rint(dct(scaled, axis=1, norm="ortho") * scale), -1e9, 1e9).astype(np.int64)


def _texts(shifted: np.ndarray) -> list[str]:
    return [
        "".join(chr(FIRST_CHARACTER + c) for c in chunk)
        for chunk in shifted.reshape(len(shifted), -1).tolist()
    ]


def _alphabet(size: int) -> list[str]:
    return [chr(FIRST_CHARACTER + i) for i in range(size)]

"""Which class a prompt means: models here are conditioned on a class, so words only choose one."""

import re
import unicodedata
from collections.abc import Sequence

from actors.serving.complaints import shortened

WORD = re.compile(r"(?<!\S)[-+]\d[\d.,]*|\d+(?:[.,]\d+)+|[^\W_]+")
"""A word, or a number that is no label: with a sign, or with a fraction."""
LONGEST_NUMBER = 9
"""Digits of a label, leading zeros included; longer ones are not even converted."""
SHOWN = 20
"""Classes that an error names."""


def classes_meant(prompt: str, classes: Sequence[str]) -> list[int]:
    """Return the labels of the classes that occur in `prompt`, sorted, each once.

    `classes` are names by label. A class is meant by its name or by its label's number, as a word or several;
    case, punctuation and Unicode's compatibility forms do not matter. Where one name is part of another
    ("boot", "ankle boot") the longer one is meant, and a number that is also a name is that name.
    """
    names: dict[tuple[str, ...], list[int]] = {}
    for label, name in enumerate(classes):
        names.setdefault(tuple(_words(name)), []).append(label)
    lengths = sorted({len(name) for name in names if name}, reverse=True)
    words = _words(prompt)
    meant: set[int] = set()
    place = 0
    while place < len(words):
        length = next((n for n in lengths if tuple(words[place : place + n]) in names), 0)
        if length:
            meant.update(names[tuple(words[place : place + length])])
        elif (number := _number(words[place])) is not None and number < len(classes):
            meant.add(number)
        place += max(length, 1)
    return sorted(meant)


def label_of(prompt: str, classes: Sequence[str]) -> int:
    """Return the label of the one class that `prompt` means.

    Raises ValueError, in one line that names the classes, if it means none or several.
    """
    meant = classes_meant(prompt, classes)
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(
            f"{shortened(prompt)} names {len(meant)} classes, {listed(classes, meant)}: name exactly one"
        )
    raise ValueError(f"{shortened(prompt)} names no class: name one of {listed(classes)}")


def listed(classes: Sequence[str], labels: Sequence[int] | None = None) -> str:
    """Return names with their labels, such as "zero (0), one (1)", for people to read; only the first 20."""
    every = range(len(classes)) if labels is None else labels
    shown = [f"{classes[label]} ({label})" for label in every[:SHOWN]]
    more = len(every) - len(shown)
    return ", ".join([*shown, f"and {more} more (GET /v1/models lists them)"] if more > 0 else shown)


def _words(text: str) -> list[str]:
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _number(word: str) -> int | None:
    """Return the label that a word of digits is; others, such as "-3" and "3.5", are none."""
    return int(word) if word.isdecimal() and len(word) <= LONGEST_NUMBER else None

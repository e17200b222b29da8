"""Instructions as word tokens: a closed vocabulary, with transformers' and tokenizers' own file format."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN = "[PAD]", "[UNK]"


def build_words(instructions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose vocabulary is the words of `instructions`, in alphabetical order."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    normal = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    found = {
        word for text in instructions for word, _ in splitter.pre_tokenize_str(normal.normalize_str(text))
    }
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, *sorted(found)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normal
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN)


def encode_words(tokenizer: PreTrainedTokenizerFast, instructions: Sequence[str], length: int) -> Tensor:
    """Return word ids padded on the right, int64 [B,length].

    Raises ValueError, in one line, for an instruction that is longer than `length` words or has a word that
    the policy was never taught.
    """
    rows = []
    for text in instructions:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) > length:
            raise ValueError(
                f"observation.instruction has {len(ids)} words, the policy reads at most {length}: "
                f"shorten {_shown(text)}"
            )
        if tokenizer.unk_token_id in ids:
            vocabulary = tokenizer.get_vocab()
            raise ValueError(
                f"observation.instruction {_shown(text)} has words that the policy was never taught, "
                f"{', '.join(word for word in _words(tokenizer, text) if word not in vocabulary)}: "
                f"it knows {', '.join(sorted(set(vocabulary) - {PAD, UNKNOWN}))}"
            )
        rows.append(ids + [tokenizer.pad_token_id] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), length)


def load_words(folder: Path) -> PreTrainedTokenizerFast:
    """Load what `save_pretrained` wrote into `folder`."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: save the policy again")
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: not a word tokenizer ({str(error).splitlines()[0]})") from error


def _words(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    backend = tokenizer.backend_tokenizer
    return [
        word for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    ]


def _shown(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")

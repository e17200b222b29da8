"""The table of encoded prompts: Parquet shards of embeddings, read row by row and never whole.

A condition is an int64 label everywhere: the number of a row here. The last row is the null prompt. Training
holds neither text encoders nor the table, only the row groups that it has asked for last.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from counterpoint.seeds import generator

TABLE = "table.json"
"""Describes a table and is written last: a folder without it is not a table."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class TableLayout:
    """What a table holds; stored as its `table.json`."""

    prompts: int
    """Number of prompts P; the table has one row more, the null prompt."""
    embeds: tuple[int, int]
    """Shape [tokens, width] of a prompt's embedding."""
    pooled: int | None
    """Width of the pooled embedding; None where the model has no added conditioning."""
    latent: tuple[int, int, int] | None
    """Shape [C,h,w] of the encoded image of each prompt; None where there are no images."""
    dtype: str
    """Type of all numbers on disk: a key of DTYPES. Values are raw little-endian bytes."""
    time_ids: tuple[int, ...] | None
    """Original height and width, crop top and left, target height and width in pixels (SDXL), or None."""
    shard_rows: int
    """Rows of each shard but the last."""
    shards: tuple[tuple[str, str], ...]
    """File name and SHA-256 of each shard."""
    group_rows: int
    """Rows that are read at once."""
    truncated: int = 0
    """Prompts that were longer than the tokenizers take."""

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the content: equal tables have equal fingerprints."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def columns(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each column of numbers."""
        shapes: dict[str, tuple[int, ...]] = {"embeds": self.embeds}
        if self.pooled is not None:
            shapes["pooled"] = (self.pooled,)
        if self.latent is not None:
            shapes["latent"] = self.latent
        return shapes

    def to_json(self) -> str:
        """Return the content of `table.json`."""
        return json.dumps(asdict(self) | {"fingerprint": self.fingerprint()}, indent=1)


def read_layout(text: str, where: str) -> TableLayout:
    """Return the layout in the text of a `table.json`; raises ValueError if it is none."""
    try:
        fields = json.loads(text)
        stored = fields.pop("fingerprint")
        for name in ("embeds", "latent", "time_ids"):
            fields[name] = None if fields[name] is None else tuple(fields[name])
        layout = TableLayout(
            **fields | {"shards": tuple((name, digest) for name, digest in fields["shards"])}
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{where}/{TABLE} does not describe encoded prompts ({error}): encode again"
        ) from error
    if layout.fingerprint() != stored or layout.dtype not in DTYPES:
        raise ValueError(f"{where}/{TABLE} does not match its own fingerprint: encode the prompts again")
    return layout


def write_shard(path: Path, prompts: Sequence[str], columns: dict[str, Tensor], group_rows: int) -> str:
    """Write a shard of prompts with columns of numbers [n, ...], and return the file's SHA-256."""
    arrays: dict[str, pa.Array] = {"prompt": pa.array(list(prompts), pa.string())}
    for name, tensor in columns.items():
        flat = tensor.detach().cpu().contiguous().flatten(1)
        raw = flat.view(torch.uint8).numpy()
        arrays[name] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(raw.shape[1]), len(raw), [None, pa.py_buffer(raw)]
        )
    # Embeddings do not compress, and dictionaries of them would only take memory.
    pq.write_table(
        pa.table(arrays), path, row_group_size=group_rows, compression="none", use_dictionary=False
    )
    return hashlib.sha256(path.read_bytes()).hexdigest()


class PromptTable:
    """A table of encoded prompts at a URI; cheap to make, and it can be pickled and copied."""

    def __init__(self, uri: str, cache_bytes: int = CACHE_BYTES) -> None:
        """Open the table in the folder `uri`; raises ValueError if there is none."""
        self.uri, self.cache_bytes = uri.rstrip("/"), cache_bytes
        self._fs, self._root = url_to_fs(self.uri)
        try:
            text = self._fs.cat_file(f"{self._root}/{TABLE}").decode()
        except FileNotFoundError as error:
            raise ValueError(
                f"{uri} holds no encoded prompts (it has no {TABLE}): give the URI of a finished run of "
                "jobs.encode"
            ) from error
        self.layout = read_layout(text, uri)
        self.null_row = self.layout.prompts
        self._forget()

    def __len__(self) -> int:
        """Return the number of prompts, without the null prompt."""
        return self.layout.prompts

    def take(self, rows: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the embeddings [n,L,D] and pooled embeddings [n,D2] of `rows` int64 [n] on `device`.

        Each row travels once, however often it is asked for. Raises ValueError for a row that is not there.
        """
        found, where = rows.detach().cpu().unique(return_inverse=True)
        where = where.to(device)
        embeds = self._column("embeds", found).to(device, dtype)[where]
        if self.layout.pooled is None:
            return embeds, None
        return embeds, self._column("pooled", found).to(device, dtype)[where]

    def latents(self, rows: Tensor) -> Tensor:
        """Return the encoded images float32 [n,C,h,w] of `rows`; raises ValueError if there are none."""
        if self.layout.latent is None:
            raise ValueError(f"{self.uri} has no latents: encode images beside the prompts")
        found, where = rows.detach().cpu().unique(return_inverse=True)
        return self._column("latent", found).float()[where]

    def prompts(self, rows: Sequence[int]) -> list[str]:
        """Return the texts of `rows`."""
        return [self._group(("prompt",), *self._place(row))["prompt"][self._within(row)] for row in rows]

    def _column(self, name: str, rows: Tensor) -> Tensor:
        beside = (name,) if name == "latent" else tuple(c for c in self.layout.columns() if c != "latent")
        picked = [self._group(beside, *self._place(r))[name][self._within(r)] for r in rows.tolist()]
        return torch.stack(picked)

    def _place(self, row: int) -> tuple[int, int]:
        """Return the shard and the row group of `row`."""
        if not 0 <= row <= self.null_row:
            raise ValueError(
                f"prompt {row} does not exist: {self.uri} has rows 0 to {self.null_row} (the null prompt)"
            )
        # The null prompt is one more row of the last shard.
        shard = min(row // self.layout.shard_rows, len(self.layout.shards) - 1)
        return shard, (row - shard * self.layout.shard_rows) // self.layout.group_rows

    def _within(self, row: int) -> int:
        shard, group = self._place(row)
        return row - shard * self.layout.shard_rows - group * self.layout.group_rows

    def _group(self, columns: tuple[str, ...], shard: int, group: int) -> dict[str, Any]:
        """Return the columns of one row group, from the cache if it was asked for lately."""
        key = (columns, shard, group)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key][0]
            table = self._file(shard).read_row_group(group, columns=list(columns))
            values = {name: self._values(name, table.column(name)) for name in columns}
            self._cache[key] = (values, table.nbytes)
            self._held += table.nbytes
            while self._held > self.cache_bytes and len(self._cache) > 1:
                _, (_, size) = self._cache.popitem(last=False)
                self._held -= size
            return values

    def _values(self, name: str, column: pa.ChunkedArray) -> Any:
        if name == "prompt":
            return column.to_pylist()
        array = column.combine_chunks()
        width = array.type.byte_width
        raw = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
        dtype = DTYPES[self.layout.dtype]
        return torch.from_numpy(raw.copy()).view(dtype).reshape(len(array), *self.layout.columns()[name])

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            name = self.layout.shards[shard][0]
            try:
                self._files[shard] = pq.ParquetFile(self._fs.open(f"{self._root}/{name}", "rb"))
            except (pa.ArrowException, OSError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(
                    f"{self.uri}/{name} cannot be read ({reason}): encode the prompts again"
                ) from error
        return self._files[shard]

    def _forget(self) -> None:
        self._files: dict[int, pq.ParquetFile] = {}
        self._cache: OrderedDict[tuple[tuple[str, ...], int, int], tuple[dict[str, Any], int]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptTable":
        return self


class LatentImages:
    """A table's encoded images as a distillation reads real samples: the class of an image is its prompt."""

    def __init__(self, table: PromptTable) -> None:
        self.table, self.num_classes, self.name = table, len(table), table.uri

    @property
    def images(self) -> "LatentImages":
        """Return what is indexed by image number."""
        return self

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.table.latents(rows)

    def of_class(self, label: int) -> Tensor:
        """Return the one image of prompt `label`, or none where the table has no images."""
        return torch.tensor([label] if self.table.layout.latent is not None else [], dtype=torch.long)


def held_out(prompts: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split the rows of `prompts` prompts into those to train on and those held out, both ascending.

    At least one row is on each side. Raises ValueError if there are fewer than two prompts.
    """
    if prompts < 2:
        raise ValueError(f"prompts={prompts}: encode at least 2, one to train on and one to hold out")
    count = min(max(1, round(prompts * share)), prompts - 1)
    order = torch.randperm(prompts, generator=generator(seed, "held-out prompts"))
    return order[count:].sort().values, order[:count].sort().values

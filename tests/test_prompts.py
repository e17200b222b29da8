"""The table of encoded prompts: what is read equals what was written, row by row, and little is held."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_text import columns, table

from counterpoint.held_out import HeldOutConfig, other_prompts, pose
from counterpoint.prompts import TABLE, LatentImages, PromptTable, held_out

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_row_reads_back_as_it_was_written(tmp_path: Path, dtype: str) -> None:
    rows = table(tmp_path, dtype=dtype)
    wanted = columns(12, getattr(torch, dtype))
    order = torch.tensor([11, 0, 7, 7, 3, 10, 11])
    embeds, pooled = rows.take(order, CPU, torch.float32)
    assert torch.equal(embeds, wanted["embeds"][order].float())
    assert pooled is not None
    assert torch.equal(pooled, wanted["pooled"][order].float())
    assert torch.equal(rows.latents(order), wanted["latent"][order].float())
    assert rows.prompts([0, 10, 11]) == ["prompt 0", "prompt 10", ""]
    assert (len(rows), rows.null_row) == (11, 11)


def test_little_is_held_and_nothing_is_lost_by_it(tmp_path: Path) -> None:
    everything = torch.arange(12)
    small = table(tmp_path, cache_bytes=2000)
    embeds, _ = small.take(everything, CPU, torch.float32)
    assert torch.equal(embeds, columns(12)["embeds"])
    assert len(small._cache) == 1
    whole = PromptTable(str(tmp_path))
    whole.take(everything, CPU, torch.float32)
    assert len(whole._cache) == 6  # Groups of at most 3 rows in shards of 4, 4 and 3 + 1.


def test_it_travels_without_what_it_has_read(tmp_path: Path) -> None:
    rows = table(tmp_path)
    rows.take(torch.arange(12), CPU, torch.float32)
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).latents(torch.tensor([2])), rows.latents(torch.tensor([2])))
    assert copy.deepcopy(rows) is rows


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"jobs\.encode"):
        PromptTable(str(tmp_path / "nowhere"))
    rows = table(tmp_path)
    with pytest.raises(ValueError, match="rows 0 to 11"):
        rows.take(torch.tensor([12]), CPU, torch.float32)
    text = (tmp_path / TABLE).read_text()
    (tmp_path / TABLE).write_text(text.replace('"prompts": 11', '"prompts": 10'))
    with pytest.raises(ValueError, match="fingerprint"):
        PromptTable(str(tmp_path))
    (tmp_path / TABLE).write_text("{}")
    with pytest.raises(ValueError, match="does not describe"):
        PromptTable(str(tmp_path))


def test_a_fingerprint_tells_tables_apart(tmp_path: Path) -> None:
    layout = table(tmp_path).layout
    assert layout.fingerprint() == table(tmp_path / "again").layout.fingerprint()
    assert layout.fingerprint() != table(tmp_path / "other", prompts=10).layout.fingerprint()
    assert layout.fingerprint() != replace(layout, time_ids=None).fingerprint()


def test_an_image_belongs_to_its_prompt(tmp_path: Path) -> None:
    images = LatentImages(table(tmp_path))
    assert images.num_classes == 11
    assert images.of_class(4).tolist() == [4]
    assert torch.equal(images.images[torch.tensor([4, 1])], columns(12)["latent"][[4, 1]])


def test_prompts_are_held_out_for_good() -> None:
    train, test = held_out(100, 0.1, seed=3)
    assert len(test) == 10
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(100))
    assert torch.equal(held_out(100, 0.1, seed=3)[1], test)
    assert not torch.equal(held_out(100, 0.1, seed=4)[1], test)
    assert [len(part) for part in held_out(2, 0.9, 0)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        held_out(1, 0.5, 0)


def test_another_prompt_is_another_held_out_one() -> None:
    question = pose(HeldOutConfig(samples=7), torch.tensor([3, 8, 9]), (4, 2, 2))
    others = other_prompts(question)
    assert others is not None
    assert others.noise is question.noise
    assert others.rows.tolist() == [8, 9, 3, 8, 9, 3, 8]
    assert other_prompts(pose(HeldOutConfig(samples=4), torch.tensor([3]), (4, 2, 2))) is None

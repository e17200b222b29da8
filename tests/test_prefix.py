"""Rows of read prefixes: repeated, picked, joined whatever their lengths, and never written to."""

import torch
from selection_policies import TinyPolicy, some_inputs

from counterpoint.policies.prefix import Prefix, join


def some_prefix(policy, mask="none", batch=3):
    return policy.prefill(policy.encode(some_inputs(batch)), [mask])


def tensors(prefix: Prefix):
    return [prefix.logits, prefix.mask, prefix.positions, *(x for layer in prefix.layers for x in layer)]


def test_repeated_rows_stand_side_by_side():
    prefix = some_prefix(TinyPolicy())
    repeated = prefix.repeat(4)
    assert repeated.rows == 12
    for one, many in zip(tensors(prefix), tensors(repeated), strict=True):
        assert torch.equal(many, one.repeat_interleave(4, 0))


def test_one_row_is_repeated_without_a_copy():
    prefix = some_prefix(TinyPolicy(), batch=1)
    keys = prefix.repeat(8).layers[0][0]
    assert keys.untyped_storage().data_ptr() == prefix.layers[0][0].untyped_storage().data_ptr()


def test_rows_are_picked_by_index_or_slice():
    prefix = some_prefix(TinyPolicy())
    for rows in (torch.tensor([2, 0]), slice(1, 3)):
        for one, picked in zip(tensors(prefix), tensors(prefix.pick(rows)), strict=True):
            assert torch.equal(picked, one[rows])


def test_joined_rows_of_other_lengths_go_on_as_they_would_alone():
    policy = TinyPolicy()
    parts = [some_prefix(policy, mask) for mask in ("none", "both", "state")]
    joined = join(parts)
    assert len({part.mask.shape[1] for part in parts}) == 3
    assert joined.rows == 9
    for token in (3, 7):
        joined = policy.advance(joined, torch.full((9,), token))
        parts = [policy.advance(part, torch.full((3,), token)) for part in parts]
        torch.testing.assert_close(joined.logits, torch.cat([part.logits for part in parts]))
    assert joined.positions.tolist() == [7, 7, 7, 3, 3, 3, 6, 6, 6]


def test_advancing_leaves_a_prefix_as_it_was():
    policy = TinyPolicy()
    prefix = some_prefix(policy)
    before = [tensor.clone() for tensor in tensors(prefix)]
    one, other = (policy.advance(prefix, torch.full((3,), token)) for token in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(tensors(prefix), before, strict=True))
    assert not torch.equal(one.logits, other.logits)
    again = policy.advance(prefix, torch.full((3,), 1))
    assert torch.equal(one.logits, again.logits)


def test_a_cache_hands_over_what_a_prefix_holds():
    prefix = some_prefix(TinyPolicy())
    cache = prefix.cache()
    assert cache.get_seq_length() == prefix.mask.shape[1]
    for layer, (keys, values) in zip(cache.layers, prefix.layers, strict=True):
        assert layer.keys is keys
        assert layer.values is values

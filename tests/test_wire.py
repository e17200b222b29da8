"""Messages carry samples, verdicts and states unchanged, cut and joined by rank; what arrives is a copy."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.wire import pack, pack_state, pack_verdict, unpack, unpack_state, unpack_verdict, wire_dtype
from counterpoint.critics.group import Samples, Verdict

CPU = torch.device("cpu")


def samples(count: int, seed: int, **options) -> Samples:
    stream = torch.Generator().manual_seed(seed)
    fake = torch.randn(count, 1, 8, 8, generator=stream)
    real = torch.randn(count, 1, 8, 8, generator=stream)
    given = {"judge": True, "micro": 1, "micros": 2} | options
    return Samples(7, fake, real, torch.arange(count) % 10, **given)


def verdict(count: int, judge: bool = True) -> Verdict:
    stream = torch.Generator().manual_seed(count)
    gradient = torch.randn(count, 1, 8, 8, generator=stream) if judge else None
    logits = torch.tensor([[0.5, float("nan")], [-1.0, 2.0]])
    return Verdict(7, 12.0, gradient, 0.7, logits, -logits, count, 3, 24)


def through_object_store(message):
    """The message as Ray hands it over: arrays that nobody may write to."""
    for value in message.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return message


def test_samples_of_all_ranks_are_joined_in_rank_order():
    parts = [samples(3, 0), samples(5, 1)]
    joined = unpack([through_object_store(pack(part)) for part in parts], CPU)
    for name in ("fake", "real", "labels"):
        expected = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(joined, name), expected), name
        assert getattr(joined, name).dtype == expected.dtype
    assert (joined.step, joined.judge, joined.micro, joined.micros) == (7, True, 1, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_unpacked_may_be_written_to_and_leaves_the_message_alone(ranks):
    messages = [through_object_store(pack(samples(2, rank))) for rank in range(ranks)]
    before = [message["fake"].copy() for message in messages]
    unpack(messages, CPU).fake.zero_()
    for message, fake in zip(messages, before, strict=True):
        np.testing.assert_array_equal(message["fake"], fake)


def test_samples_that_need_gradients_or_lie_crosswise_are_packed():
    crosswise = torch.randn(8, 8, 1, 4).permute(3, 2, 0, 1).requires_grad_()
    part = Samples(0, crosswise, crosswise.detach(), torch.zeros(4, dtype=torch.long), False, 0, 1)
    message = pack(part)
    assert message["fake"].flags.c_contiguous
    assert torch.equal(unpack([message], CPU).fake, crosswise.detach())


def test_verdict_is_cut_by_rank_and_its_sums_are_shared_out():
    whole = verdict(8)
    sizes = [3, 1, 4]
    parts = [unpack_verdict(through_object_store(part)) for part in pack_verdict(whole, sizes)]
    assert [part.samples for part in parts] == sizes
    assert torch.equal(torch.cat([part.gradient for part in parts]), whole.gradient)
    assert [part.loss for part in parts] == pytest.approx([4.5, 1.5, 6.0])
    assert sum(part.loss for part in parts) == pytest.approx(whole.loss)
    for part in parts:
        assert torch.equal(part.real_logits.nan_to_num(99.0), whole.real_logits.nan_to_num(99.0))
        assert torch.equal(part.fake_logits.nan_to_num(99.0), whole.fake_logits.nan_to_num(99.0))
        assert (part.step, part.critic_loss, part.refreshed, part.voting) == (7, 0.7, 3, 24)


def test_verdict_without_judgement_has_no_gradient():
    for part in pack_verdict(verdict(4, judge=False), [2, 2]):
        assert unpack_verdict(part).gradient is None


def test_verdict_may_be_written_to():
    (message,) = pack_verdict(verdict(4), [4])
    arrived = unpack_verdict(through_object_store(message))
    arrived.gradient.zero_()
    assert np.abs(message["gradient"]).sum() > 0


def test_state_keeps_types_shapes_and_scalars():
    state = {
        "rows": torch.randn(2, 3),
        "ticks": torch.tensor(41),
        "generations": torch.arange(4),
        "halves": torch.randn(2, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "none": torch.empty(0, 5),
    }
    arrived = unpack_state(through_object_store(pack_state(state)))
    assert list(arrived) == list(state)
    for name, tensor in state.items():
        assert arrived[name].dtype == tensor.dtype, name
        assert torch.equal(arrived[name], tensor), name
    before = state["rows"].clone()
    arrived["rows"].zero_()
    assert torch.equal(state["rows"], before)


def test_bfloat16_halves_the_images_and_keeps_the_rest_exact():
    part = samples(4, 0)
    exact, half = pack(part), pack(part, "bfloat16")
    for name in ("fake", "real"):
        assert half[name].nbytes * 2 == exact[name].nbytes
        assert half[name].shape == exact[name].shape
    assert half["labels"].nbytes == exact["labels"].nbytes
    arrived = unpack([through_object_store(half)], CPU)
    assert arrived.fake.dtype == torch.float32
    assert torch.equal(arrived.fake, part.fake.to(torch.bfloat16).float())
    assert torch.equal(arrived.real, part.real.to(torch.bfloat16).float())
    assert torch.equal(arrived.labels, part.labels)
    assert (wire_dtype(exact), wire_dtype(half)) == ("float32", "bfloat16")


def test_bfloat16_messages_of_several_ranks_are_joined():
    parts = [samples(3, 0), samples(5, 1)]
    joined = unpack([through_object_store(pickled(pack(part, "bfloat16"))) for part in parts], CPU)
    assert torch.equal(joined.fake, torch.cat([part.fake for part in parts]).to(torch.bfloat16).float())


def pickled(message):
    return pickle.loads(pickle.dumps(message, protocol=5))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_a_gradient_in_bfloat16_loses_digits_but_no_range(scale):
    whole = verdict(4)
    whole = replace(whole, gradient=whole.gradient * scale)
    (message,) = pack_verdict(whole, [4], "bfloat16")
    assert message["gradient"].nbytes == whole.gradient.numel() * 2
    arrived = unpack_verdict(through_object_store(message)).gradient
    # Eight significant bits, rounded to nearest.
    assert ((arrived - whole.gradient).abs() <= whole.gradient.abs() * 2**-8).all()
    assert arrived.dtype == torch.float32


def test_what_is_bfloat16_already_crosses_unchanged_whatever_is_chosen():
    part = samples(2, 0)
    part = replace(part, fake=part.fake.to(torch.bfloat16))
    message = pack(part)
    assert message["fake"].nbytes == part.fake.numel() * 2
    assert torch.equal(unpack([message], CPU).fake, part.fake.float())
    state = {"weights": part.fake, "count": torch.tensor(1.5, dtype=torch.bfloat16)}
    arrived = unpack_state(pack_state(state))
    assert all(torch.equal(arrived[name], tensor) for name, tensor in state.items())
    assert {tensor.dtype for tensor in arrived.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_direct_transport_is_given_tensors_that_share_no_memory(dtype):
    whole = verdict(6)
    parts = pack_verdict(whole, [2, 4], dtype, "nixl")
    assert all(part["gradient"].dtype == getattr(torch, dtype) for part in parts)
    before = whole.gradient.clone()
    for part in parts:
        part["gradient"].zero_()
    assert torch.equal(whole.gradient, before)
    arrived = [unpack_verdict(part) for part in pack_verdict(whole, [2, 4], dtype, "nixl")]
    expected = before.to(getattr(torch, dtype)).float()
    assert torch.equal(torch.cat([one.gradient for one in arrived]), expected)
    assert unpack_verdict(pack_verdict(verdict(2, judge=False), [2], dtype, "nixl")[0]).gradient is None

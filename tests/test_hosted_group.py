"""A hosted critic group without Ray around it: messages of a step ahead, snapshots that lose no answer."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import group, samples

from actors.assembly import Behind
from actors.critics import HostedGroup, HostSettings
from actors.wire import pack
from cluster.checkpoints import checkpoint_steps
from cluster.storage import RunStore

EVERY, STEPS = 3, 9


def hosted(folder):
    settings = HostSettings("critics-1", (1,), str(folder), EVERY, patience=20.0)
    return HostedGroup(group(refresh_rate=0.05), RunStore(str(folder)), settings, torch.device("cpu"))


def message(step, ahead=1, answered=None):
    """What a rank sends that asks `ahead` steps before it takes the answer."""
    known = step - 1 - ahead if answered is None else answered
    links = {"after": (step - 1, 0) if step else None, "answered": (known, 0) if known >= 0 else None}
    return pack(samples(step)) | links


@pytest.fixture(scope="module")
def expected():
    """The gradients of an undisturbed group, and its digest in the end."""
    alone = group(refresh_rate=0.05)
    return [alone.judge(samples(step)).gradient.numpy() for step in range(STEPS)], alone.digest()


def test_the_next_message_may_arrive_while_the_last_one_waits_for_another_rank(expected, tmp_path):
    host = hosted(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        first = [threads.submit(host.judge, 0, 2, half(step, 0)) for step in range(2)]
        second = [threads.submit(host.judge, 1, 2, half(step, 1)) for step in (1, 0)][::-1]
        for step in range(2):
            gradient = np.concatenate([one[step].result(20)["gradient"] for one in (first, second)])
            np.testing.assert_allclose(gradient, expected[0][step], atol=1e-6)


def half(step, rank):
    whole = message(step)
    cut = slice(3 * rank, 3 * rank + 3)
    return whole | {name: whole[name][cut] for name in ("fake", "real", "labels")}


def test_a_message_whose_predecessor_was_lost_is_sent_back(tmp_path):
    with pytest.raises(Behind, match="expects step 0, micro-batch 0"):
        hosted(tmp_path).judge(0, 1, message(1))


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_snapshot_counts_once_every_answer_from_before_it_has_arrived(tmp_path, ahead):
    host = hosted(tmp_path)
    stored = []
    for step in range(STEPS):
        host.judge(0, 1, message(step, ahead))
        stored.append(checkpoint_steps(host.store))
    # Before step 3 is judged, or a step later by those who have the answer to step 2 a step later.
    first = EVERY + ahead
    assert stored[:first] == [[]] * first
    assert stored[first : first + EVERY] == [[EVERY]] * EVERY


@pytest.mark.parametrize("at", range(1, STEPS))
def test_a_restarted_group_gives_every_answer_that_may_be_missing(expected, tmp_path, at):
    """The host dies after judging step `at`, whose answer and the one before nobody has."""
    gradients, digest = expected
    host, durable = hosted(tmp_path), 0
    for step in range(at + 1):
        durable = host.judge(0, 1, message(step))["durable"]
    again = hosted(tmp_path)
    assert durable <= again.next_key[0] <= at - 1 or again.next_key[0] == 0
    for step in range(again.next_key[0], STEPS):
        answer = again.judge(0, 1, message(step))
        np.testing.assert_array_equal(answer["gradient"], gradients[step])
    assert again.group.digest() == digest


def test_an_answer_is_given_again_until_its_rank_is_known_to_have_it(expected, tmp_path):
    host = hosted(tmp_path)
    for step in range(3):
        host.judge(0, 1, message(step))
    for step in (1, 2):
        np.testing.assert_array_equal(host.judge(0, 1, message(step))["gradient"], expected[0][step])
    with pytest.raises(RuntimeError, match="has judged step 0 long ago"):
        host.judge(0, 1, message(0))

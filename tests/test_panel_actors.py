"""The panel in actors is the panel in one process, wherever it lives and whatever dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
from tiny_jobs import distiller, local_panel, panel_recipe, remote_panel, start_hosts

from counterpoint.critics.messages import Samples

STEPS = 20
EVERY = 7
"""Steps between snapshots, as `start_hosts` has it."""


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.unet.parameters()])


def run(recipe, panel, **options):
    trainer = distiller(recipe, panel, STEPS, **options)
    for step in range(STEPS):
        trainer.step(step)
    return trainer


def slay(host):
    os.kill(ray.get(host.actor.pid.remote(), timeout=240), signal.SIGKILL)


@pytest.fixture(scope="module")
def recipe(tiny_teacher):
    return panel_recipe(tiny_teacher)


@pytest.fixture(scope="module")
def hosts(ray_cluster, recipe, tmp_path_factory):
    """Two hosts of unequal shares, for up to two ranks; tests set them to a state first."""
    made = start_hosts(recipe, [(0,), (1, 2, 3)], tmp_path_factory.mktemp("hosts"), ranks=2)
    yield made
    for host in made:
        ray.kill(host.actor)


def anew(recipe, hosts, ranks=1):
    """The panels of all ranks, whose hosts hold the heads of the beginning."""
    panels = [remote_panel(recipe, hosts, rank, ranks) for rank in range(ranks)]
    start = local_panel(recipe).state()
    for panel in panels[::-1]:
        panel.load(start, 0)
    return panels


def test_killed_hosts_come_back_and_the_student_and_the_heads_are_those_of_one_process(hosts, recipe):
    """The first dies before any snapshot, and again after a return to an earlier state."""
    alone = run(recipe, local_panel(recipe))
    expected, heads = weights(alone), alone.panel.state()
    trainer = distiller(recipe, remote_panel(recipe, hosts), STEPS)
    for step in range(EVERY + 5):
        if step == 3:
            slay(hosts[1])
        if step == EVERY + 2:
            state = trainer.state()
        trainer.step(step)
    assert trainer.panel.recoveries > 0
    trainer.load(state, EVERY + 2)
    # A restart now must not find what was snapshot later than the state.
    slay(hosts[0])
    for step in range(EVERY + 2, STEPS):
        trainer.step(step)
    assert (weights(trainer) - expected).abs().max() < 1e-5
    state = trainer.panel.state()
    for name, group in heads.items():
        for key, tensor in group.items():
            assert torch.allclose(state[name][key], tensor, atol=1e-5), (name, key)


def batch_of(step, whole):
    stream = torch.Generator().manual_seed(step)
    fake, real = torch.randn(2, 16, 1, 8, 8, generator=stream)
    return fake, real, torch.arange(16) % 10, whole.pool.assign_groups(step, 16)


HALVES = [slice(0, 8), slice(8, 16)]


def ask_halves(ranks, step, batch):
    """Let both ranks ask about their halves of a step, now one first and now the other."""
    fake, real, labels, groups = batch
    asked = {}
    for rank in (0, 1) if step % 2 else (1, 0):
        half = HALVES[rank]
        asked[rank] = ranks[rank].ask(Samples(step, fake[half], real[half], labels[half]), groups[half])
    return asked


def test_two_ranks_are_judged_as_one_batch_in_any_order(hosts, recipe):
    """Two ranks' halves, whichever is sent first, get the whole batch's verdict and teach heads the same."""
    ranks, whole = anew(recipe, hosts, 2), local_panel(recipe)
    for step in range(4):
        batch = batch_of(step, whole)
        asked = ask_halves(ranks, step, batch)
        verdicts = [asked[rank].result() for rank in range(2)]
        expected = whole.ask(Samples(step, *batch[:3]), batch[3]).result()
        # Each rank's gradient is of the mean over its own half.
        gradient = torch.cat([verdict.gradient for verdict in verdicts]) / 2
        torch.testing.assert_close(gradient, expected.gradient, atol=1e-6, rtol=0.0)
        assert sum(v.loss for v in verdicts) / 2 == pytest.approx(expected.loss, abs=1e-5)
    mine, theirs = ranks[0].state(), whole.state()
    for name, group in theirs.items():
        for key in group:
            assert torch.allclose(mine[name][key].float(), group[key].float(), atol=1e-5), (name, key)
    assert [panel.recoveries for panel in ranks] == [0, 0]


@pytest.mark.slow  # the last test here asks ahead through a host's death, with two ranks
def test_asking_ahead_gives_the_same_student_whatever_dies(hosts, recipe):
    alone = run(recipe, local_panel(recipe), staleness=1)
    (panel,) = anew(recipe, hosts)
    trainer = distiller(recipe, panel, STEPS, staleness=1)
    for step in range(STEPS):
        if step == STEPS - 4:
            # Taken up from a checkpoint with a verdict in it, by hosts that are a step ahead.
            trainer.load(trainer.state(), step)
        if step == EVERY + 2:
            slay(hosts[1])
        trainer.step(step)
    assert trainer.panel.recoveries > 0
    assert (weights(trainer) - weights(alone)).abs().max() < 1e-5
    ticks = [critics.state()["critics-1"]["ticks"] for critics in (trainer.panel, alone.panel)]
    assert torch.equal(*ticks)


def test_two_ranks_ask_ahead_in_any_order_and_a_killed_host_gives_every_answer_again(hosts, recipe):
    """Rank 1 is a whole step behind rank 0 in taking its answers when a host dies after a snapshot."""
    ranks, whole = anew(recipe, hosts, 2), local_panel(recipe)
    asked, expected = {}, {}

    def ask(step):
        batch = batch_of(step, whole)
        asked[step] = ask_halves(ranks, step, batch)
        expected[step] = whole.ask(Samples(step, *batch[:3]), batch[3]).result()

    def answer(step, rank):
        gradient = asked[step].pop(rank).result().gradient / 2
        torch.testing.assert_close(gradient, expected[step].gradient[HALVES[rank]], atol=1e-5, rtol=0.0)

    def answer_all(rank):
        for step in sorted(asked):
            if rank in asked[step]:
                answer(step, rank)

    ask(0)
    for step in range(EVERY):
        ask(step + 1)
        answer(step, 0)
        answer(step, 1)
    ask(EVERY + 1)
    answer(EVERY, 0)
    # The snapshot before step 7 waits for rank 1's answer to step 6, which it has had by step 8.
    slay(hosts[1])
    # Answers may have left the host before it died: a rank learns of the loss at its next one.
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(answer_all, (0, 1)))
        ask(EVERY + 2)
        list(threads.map(answer_all, (0, 1)))
    assert all(panel.recoveries for panel in ranks)

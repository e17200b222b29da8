"""The panel in actors is the panel in one process, wherever it lives and whatever dies."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
import torch
from tiny_jobs import distiller, local_panel, panel_recipe, remote_panel, start_hosts

from counterpoint.critics.messages import Samples

STEPS = 50


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.unet.parameters()])


def run(recipe, panel, steps=STEPS, **options):
    trainer = distiller(recipe, panel, STEPS, **options)
    for step in range(steps):
        trainer.step(step)
    return trainer


@pytest.fixture(scope="module")
def undisturbed(tiny_teacher):
    recipe = panel_recipe(tiny_teacher)
    trainer = run(recipe, local_panel(recipe))
    return recipe, weights(trainer), trainer.panel.state()


@pytest.mark.parametrize("shares", [[(0, 1, 2, 3)], [(0,), (1,), (2,), (3,)]], ids=["1 actor", "4 actors"])
def test_same_student_and_same_heads_as_in_process(ray_cluster, undisturbed, tmp_path, shares):
    recipe, expected, heads = undisturbed
    hosts = start_hosts(recipe, shares, tmp_path)
    trainer = run(recipe, remote_panel(recipe, hosts))
    assert (weights(trainer) - expected).abs().max() < 1e-5
    state = trainer.panel.state()
    for name, group in heads.items():
        for key, tensor in group.items():
            assert torch.allclose(state[name][key], tensor, atol=1e-5), (name, key)
    kill(hosts)


@pytest.mark.parametrize("at", [3, 7, 25])
def test_a_killed_host_comes_back_and_nothing_is_lost(ray_cluster, undisturbed, tmp_path, at):
    recipe, expected, heads = undisturbed
    hosts = start_hosts(recipe, [(0, 1), (2, 3)], tmp_path)
    trainer = distiller(recipe, remote_panel(recipe, hosts), STEPS)
    for step in range(STEPS):
        if step == at:
            os.kill(ray.get(hosts[0].actor.pid.remote(), timeout=30), signal.SIGKILL)
        trainer.step(step)
    assert trainer.panel.recoveries > 0
    assert (weights(trainer) - expected).abs().max() < 1e-5
    assert torch.equal(trainer.panel.state()["critics-0"]["ticks"], heads["critics-0"]["ticks"])
    kill(hosts)


def test_loading_a_state_rewinds_hosts_and_forgets_later_snapshots(ray_cluster, undisturbed, tmp_path):
    recipe, expected, _ = undisturbed
    hosts = start_hosts(recipe, [(0, 1, 2, 3)], tmp_path)
    trainer = distiller(recipe, remote_panel(recipe, hosts), STEPS)
    for step in range(20):
        trainer.step(step)
    state = trainer.state()
    for step in range(20, 40):
        trainer.step(step)
    trainer.load(state, 20)
    # A restart now must not find the snapshots of steps 21 to 40.
    os.kill(ray.get(hosts[0].actor.pid.remote(), timeout=30), signal.SIGKILL)
    for step in range(20, STEPS):
        trainer.step(step)
    assert (weights(trainer) - expected).abs().max() < 1e-5
    kill(hosts)


def test_two_ranks_are_judged_as_one_batch_in_any_order(ray_cluster, undisturbed, tmp_path):
    """Two ranks' halves, whichever is sent first, get the whole batch's verdict and teach heads the same."""
    recipe, _, _ = undisturbed
    hosts = start_hosts(recipe, [(0, 1, 2, 3)], tmp_path, ranks=2)
    ranks = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)]
    whole = local_panel(recipe)
    for step in range(6):
        stream = torch.Generator().manual_seed(step)
        fake, real = torch.randn(2, 16, 1, 8, 8, generator=stream)
        labels, groups = torch.arange(16) % 10, whole.pool.assign_groups(step, 16)
        halves = [slice(0, 8), slice(8, 16)]
        asked = {}
        for rank in (0, 1) if step % 2 else (1, 0):
            half = halves[rank]
            asked[rank] = ranks[rank].ask(Samples(step, fake[half], real[half], labels[half]), groups[half])
        verdicts = [asked[rank].result() for rank in range(2)]
        expected = whole.ask(Samples(step, fake, real, labels), groups).result()
        # Each rank's gradient is of the mean over its own half.
        gradient = torch.cat([verdict.gradient for verdict in verdicts]) / 2
        torch.testing.assert_close(gradient, expected.gradient, atol=1e-6, rtol=0.0)
        assert sum(v.loss for v in verdicts) / 2 == pytest.approx(expected.loss, abs=1e-5)
    mine, theirs = ranks[0].state(), whole.state()
    for name, group in theirs.items():
        for key in group:
            assert torch.allclose(mine[name][key].float(), group[key].float(), atol=1e-5), (name, key)
    kill(hosts)


@pytest.fixture(scope="module")
def ahead(tiny_teacher):
    """A student that asks a step ahead, its panel in this process: its weights and heads after each cut."""
    recipe = panel_recipe(tiny_teacher)
    trainer = run(recipe, local_panel(recipe), 24, staleness=1)
    return recipe, weights(trainer), trainer.panel.state()


@pytest.mark.parametrize("at", [(), (9, 16)], ids=["undisturbed", "killed"])
def test_asking_ahead_gives_the_same_student_whatever_dies(ray_cluster, ahead, tmp_path, at):
    recipe, expected, heads = ahead
    hosts = start_hosts(recipe, [(0, 1, 2, 3)], tmp_path)
    trainer = distiller(recipe, remote_panel(recipe, hosts), STEPS, staleness=1)
    for step in range(24):
        if step in at:
            os.kill(ray.get(hosts[0].actor.pid.remote(), timeout=30), signal.SIGKILL)
        trainer.step(step)
    assert (trainer.panel.recoveries > 0) is bool(at)
    state = trainer.state()
    assert (weights(trainer) - expected).abs().max() < 1e-5
    assert torch.equal(state["critics-0"]["ticks"], heads["critics-0"]["ticks"])
    # Taken up from a checkpoint with a verdict in it, by hosts that are a step ahead.
    trainer.step(24)
    after, told = weights(trainer), trainer.panel.digests()
    trainer.load(state, 24)
    trainer.step(24)
    assert torch.equal(weights(trainer), after)
    assert trainer.panel.digests() == told
    kill(hosts)


def test_two_ranks_ask_ahead_in_any_order_and_a_killed_host_gives_every_answer_again(
    ray_cluster, undisturbed, tmp_path
):
    """Rank 1 is a whole step behind rank 0 in taking its answers when the host dies after a snapshot."""
    recipe, _, _ = undisturbed
    hosts = start_hosts(recipe, [(0, 1, 2, 3)], tmp_path, ranks=2)
    ranks, whole = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)], local_panel(recipe)
    asked, expected = {}, {}

    def ask(step):
        stream = torch.Generator().manual_seed(step)
        fake, real = torch.randn(2, 16, 1, 8, 8, generator=stream)
        labels, groups = torch.arange(16) % 10, whole.pool.assign_groups(step, 16)
        for rank in (0, 1) if step % 2 else (1, 0):
            half = slice(8 * rank, 8 * rank + 8)
            asked[step, rank] = ranks[rank].ask(
                Samples(step, fake[half], real[half], labels[half]), groups[half]
            )
        expected[step] = whole.ask(Samples(step, fake, real, labels), groups).result()

    def answer(step, rank):
        gradient = asked.pop((step, rank)).result().gradient / 2
        half = slice(8 * rank, 8 * rank + 8)
        torch.testing.assert_close(gradient, expected[step].gradient[half], atol=1e-5, rtol=0.0)

    ask(0)
    for step in range(12):
        ask(step + 1)
        answer(step, 0)
        if step == 7:
            # The snapshot before step 7 waits for rank 1's answer to step 6, which it has had by step 8.
            os.kill(ray.get(hosts[0].actor.pid.remote(), timeout=30), signal.SIGKILL)
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(answer, (step, step + 1), (1, 0)))
            answer(step + 1, 1)
            ask(step + 2)
            break
        answer(step, 1)
    for rank in (0, 1):
        answer(9, rank)
    kill(hosts)


def kill(hosts):
    for host in hosts:
        ray.kill(host.actor)

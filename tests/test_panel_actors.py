"""The panel in actors is the panel in one process, wherever it lives and whatever dies."""

import os
import signal

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


def kill(hosts):
    for host in hosts:
        ray.kill(host.actor)

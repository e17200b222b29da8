"""Replicated hosts hold the heads of one host, whatever dies; and samples may cross in half the bytes."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import ray
import torch
from tiny_jobs import distiller, local_panel, panel_recipe, remote_panel, start_hosts

from actors.panel import HostHandle, RemotePanel
from cluster.failures import Failure
from counterpoint.critics.messages import Samples
from jobs.settings import DistillConfig, HostedCriticsConfig

STEPS, BATCH = 16, 16
SHARES = [(0, 1, 2, 3)]


def step(panels, number):
    """Ask all ranks' panels about their shares of one step, at once, and return the joined gradient."""
    stream = torch.Generator().manual_seed(number)
    fake, real = torch.randn(2, BATCH, 1, 8, 8, generator=stream)
    labels, groups = torch.arange(BATCH) % 10, panels[0].pool.assign_groups(number, BATCH)
    size = BATCH // len(panels)

    def ask(rank):
        here = slice(rank * size, (rank + 1) * size)
        return panels[rank].ask(Samples(number, fake[here], real[here], labels[here]), groups[here]).result()

    with ThreadPoolExecutor(len(panels)) as threads:
        verdicts = list(threads.map(ask, range(len(panels))))
    return torch.cat([verdict.gradient for verdict in verdicts]) / len(panels), verdicts


def digests(hosts):
    """Each host's own digests."""
    return [ray.get(host.actor.digests.remote(), timeout=30) for host in hosts]


@pytest.fixture(scope="module")
def alone(tiny_teacher):
    """One panel in this process, after all steps, and its gradients."""
    recipe = panel_recipe(tiny_teacher, refresh_rate=0.02)
    panel = local_panel(recipe)
    gradients, losses = [], []
    for number in range(STEPS):
        gradient, (verdict,) = step([panel], number)
        gradients.append(gradient)
        losses.append({group: v.critic_loss for group, v in verdict.groups.items()})
    return recipe, gradients, losses, panel.state()


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, alone, tmp_path_factory):
    """Two replicas for four ranks: their digests after all steps, and after half of them their state."""
    recipe, gradients, losses, _ = alone
    hosts = start_hosts(recipe, SHARES, tmp_path_factory.mktemp("replicas"), ranks=4, replicas=2)
    panels = [remote_panel(recipe, hosts, rank, 4) for rank in range(4)]
    for number in range(STEPS):
        gradient, verdicts = step(panels, number)
        torch.testing.assert_close(gradient, gradients[number], atol=1e-5, rtol=0.0)
        for verdict in verdicts:
            found = {group: v.critic_loss for group, v in verdict.groups.items()}
            assert found == pytest.approx(losses[number], abs=1e-4)
    yield hosts, panels, digests(hosts)
    kill(hosts)


def test_two_replicas_are_the_panel_in_one_process(undisturbed, alone):
    _, panels, told = undisturbed
    assert told[0] == told[1]
    assert panels[0].digests() == told[0]
    assert [panel.hosts[0].replica for panel in panels] == [0, 0, 1, 1]
    states = [panels[rank].state() for rank in (0, 3)]
    for name, group in alone[3].items():
        for key, tensor in group.items():
            assert torch.equal(states[0][name][key], states[1][name][key]), (name, key)
            assert torch.allclose(states[0][name][key].float(), tensor.float(), atol=1e-4), (name, key)


@pytest.mark.parametrize("victims", [(1,), (0, 1)], ids=["one", "both"])
def test_killed_replicas_come_back_with_the_same_heads(undisturbed, alone, tmp_path, victims):
    recipe, gradients, _, _ = alone
    hosts = start_hosts(recipe, SHARES, tmp_path, ranks=2, replicas=2)
    panels = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)]
    for number in range(STEPS):
        if number == 10:
            for victim in victims:
                os.kill(ray.get(hosts[victim].actor.pid.remote(), timeout=30), signal.SIGKILL)
        gradient, _ = step(panels, number)
        torch.testing.assert_close(gradient, gradients[number], atol=1e-5, rtol=0.0)
    assert [panels[rank].recoveries > 0 for rank in range(2)] == [rank in victims for rank in range(2)]
    told = digests(hosts)
    assert told[0] == told[1]
    kill(hosts)


def test_a_state_is_loaded_into_all_replicas(undisturbed):
    hosts, panels, told = undisturbed
    state = panels[0].state()
    step(panels, STEPS)
    assert digests(hosts)[1] != told[1]
    for rank in (3, 2, 1, 0):
        panels[rank].load(state, STEPS)
    assert digests(hosts) == told
    step(panels, STEPS)
    assert len({str(one) for one in digests(hosts)}) == 1


def test_replicas_of_different_heads_are_found_out(undisturbed):
    hosts, panels, _ = undisturbed
    state = panels[0].state()
    ray.get(hosts[1].actor.load.remote(packed(panels[0].pool, state), STEPS), timeout=30)
    with pytest.raises(RuntimeError, match="critics-0-1 holds other heads of critics-0"):
        panels[0].digests()


def packed(pool, state):
    from actors.wire import pack_state

    other = {name: dict(group) for name, group in state.items()}
    other["critics-0"]["bank0.rows"] = other["critics-0"]["bank0.rows"] + 1.0
    return {name: pack_state(group) for name, group in other.items()}


def test_a_collective_group_gives_the_same_heads_and_is_begun_anew_after_a_loss(
    ray_cluster, tiny_teacher, tmp_path
):
    recipe = panel_recipe(tiny_teacher, noise_levels=(250,), levels_per_step=1)
    told = {}
    for transport in ("object_store", "gloo"):
        hosts = start_hosts(recipe, [(0,)], tmp_path / transport, ranks=2, replicas=2, transport=transport)
        panels = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)]
        for number in range(4):
            step(panels, number)
        told[transport] = digests(hosts)
        if transport == "object_store":
            kill(hosts)
    assert told["gloo"][0] == told["gloo"][1] == told["object_store"][0]
    state = panels[0].state()
    os.kill(ray.get(hosts[1].actor.pid.remote(), timeout=30), signal.SIGKILL)
    with pytest.raises(Failure) as lost:
        step(panels, 4)
    assert lost.value.kind == "infrastructure"
    # What trainers do that go back to a checkpoint.
    again = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)]
    for panel in again[::-1]:
        panel.load(state, 4)
    assert digests(hosts) == told["gloo"]
    step(again, 4)
    assert len({str(one) for one in digests(hosts)}) == 1
    assert digests(hosts) != told["gloo"]
    kill(hosts)


@pytest.mark.skipif(find_spec("nixl") is None, reason="needs the package nixl")
def test_gradients_by_nixl_are_those_by_the_object_store_whatever_dies(ray_cluster, alone, tmp_path):
    recipe, gradients, _, _ = alone
    hosts = start_hosts(recipe, SHARES, tmp_path, transport="nixl")
    panel = remote_panel(recipe, hosts)
    for number in range(STEPS):
        if number == 10:
            os.kill(ray.get(hosts[0].actor.pid.remote(), timeout=30), signal.SIGKILL)
        gradient, _ = step([panel], number)
        torch.testing.assert_close(gradient, gradients[number], atol=1e-5, rtol=0.0)
    assert panel.recoveries > 0
    kill(hosts)


def test_a_distillation_over_bfloat16_stays_near(ray_cluster, alone, tmp_path):
    recipe = alone[0]
    hosts = start_hosts(recipe, SHARES, tmp_path, wire_dtype="bfloat16")
    rounded, exact = remote_panel(recipe, hosts), local_panel(recipe)
    students = [distiller(recipe, panel, STEPS) for panel in (rounded, exact)]
    start = flat(students[0])
    for number in range(STEPS):
        figures = [student.step(number) for student in students]
        assert figures[0]["adversarial_loss"] == pytest.approx(figures[1]["adversarial_loss"], abs=0.05)
    moved, apart = (flat(students[1]) - start).norm(), (flat(students[0]) - flat(students[1])).norm()
    assert 0 < apart < 0.2 * moved
    kill(hosts)


def flat(student):
    return torch.cat([p.detach().flatten() for p in student.unet.parameters()])


def test_ranks_that_replicas_cannot_share_are_refused(alone):
    hosts = [HostHandle(f"critics-{r}", (0, 1, 2, 3), None, r, 2) for r in range(2)]
    with pytest.raises(ValueError, match="replicas=2 does not divide the 3 ranks"):
        RemotePanel(local_panel(alone[0]).pool, hosts, 0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critics": {"replicas": 2}}, "critics.replicas=2 does not divide trainer.workers=1"),
        (
            {"critics": {"replicas": 2}, "trainer": {"workers": 3}},
            "critics.replicas=2 does not divide trainer.workers=3, of which each replica serves as many",
        ),
        (
            {"critics": {"transport": "gloo"}},
            "a Ray Train worker cannot be an end of it",
        ),
        (
            {"critics": {"transport": "gloo", "replicas": 2, "actors": 2}},
            "transport=gloo needs an actor for each of the 4 noise levels, not actors=2",
        ),
        (
            {"critics": {"transport": "nccl", "replicas": 2}},
            "needs a GPU for each actor, not gpus_per_actor=0: set it to 1, or transport to gloo",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.model_validate(options)
    with pytest.raises(ValueError, match="keeps the critics in the trainer, with no wire"):
        HostedCriticsConfig(actors=0, wire_dtype="bfloat16")


def kill(hosts):
    for host in hosts:
        ray.kill(host.actor)

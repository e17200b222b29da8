"""Replicated hosts hold the heads of one host, whatever dies; and samples may cross in half the bytes."""

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec

import pytest
import ray
import torch
from tiny_jobs import local_panel, panel_recipe, remote_panel, start_hosts

from actors.panel import HostHandle, RemotePanel
from actors.recipe import PanelRecipe
from actors.wire import pack_state
from cluster.failures import Failure
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.messages import Samples
from counterpoint.diffusion import NoiseConfig
from jobs import stage
from jobs.settings import DistillConfig, EvaluatorsConfig, HostedCriticsConfig
from jobs.stage import TrainerConfig

STEPS, BATCH = 12, 16
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
    return [ray.get(host.actor.digests.remote(), timeout=240) for host in hosts]


def slay(host):
    os.kill(ray.get(host.actor.pid.remote(), timeout=240), signal.SIGKILL)


def anew(recipe, hosts, ranks):
    """The panels of all ranks, whose hosts hold the heads of the beginning."""
    panels = [remote_panel(recipe, hosts, rank, ranks) for rank in range(ranks)]
    start = local_panel(recipe).state()
    for panel in panels[::-1]:
        panel.load(start, 0)
    return panels


def kill(hosts):
    for host in hosts:
        ray.kill(host.actor)


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
def hosts(ray_cluster, alone, tmp_path_factory):
    """Two replicas, for up to four ranks; tests set them to a state first."""
    made = start_hosts(alone[0], SHARES, tmp_path_factory.mktemp("replicas"), ranks=4, replicas=2)
    yield made
    kill(made)


def test_two_replicas_are_the_panel_in_one_process_and_a_state_is_loaded_into_both(hosts, alone):
    recipe, gradients, losses, heads = alone
    panels = [remote_panel(recipe, hosts, rank, 4) for rank in range(4)]
    assert [panel.hosts[0].replica for panel in panels] == [0, 0, 1, 1]
    for number in range(STEPS):
        gradient, verdicts = step(panels, number)
        torch.testing.assert_close(gradient, gradients[number], atol=1e-5, rtol=0.0)
        for verdict in verdicts:
            found = {group: v.critic_loss for group, v in verdict.groups.items()}
            assert found == pytest.approx(losses[number], abs=1e-4)
    told = digests(hosts)
    assert told[0] == told[1] == panels[0].digests()
    states = [panels[rank].state() for rank in (0, 3)]
    for name, group in heads.items():
        for key, tensor in group.items():
            assert torch.equal(states[0][name][key], states[1][name][key]), (name, key)
            assert torch.allclose(states[0][name][key].float(), tensor.float(), atol=1e-4), (name, key)
    step(panels, STEPS)
    assert digests(hosts)[1] != told[1]
    for rank in (3, 2, 1, 0):
        panels[rank].load(states[0], STEPS)
    assert digests(hosts) == told


def test_killed_replicas_come_back_with_the_same_heads(hosts, alone):
    """One dies before the first snapshot, and both after it: what each contributed since is found again."""
    recipe, gradients, _, _ = alone
    panels = anew(recipe, hosts, 2)
    for number in range(STEPS):
        for host in {4: hosts[1:], 10: hosts}.get(number, ()):
            slay(host)
        gradient, _ = step(panels, number)
        torch.testing.assert_close(gradient, gradients[number], atol=1e-5, rtol=0.0)
        assert [panel.recoveries > 0 for panel in panels] == [number >= 10, number >= 4]
    told = digests(hosts)
    assert told[0] == told[1]


def test_bfloat16_rounds_what_crosses_and_nothing_else(hosts, alone):
    recipe, gradients, _, _ = alone
    panels = anew(recipe, [replace(host, wire_dtype="bfloat16") for host in hosts], 2)
    for number in range(4):
        gradient, _ = step(panels, number)
        apart = (gradient - gradients[number]).norm() / gradients[number].norm()
        assert 1e-4 < apart < 0.1, number
    told = digests(hosts)
    assert told[0] == told[1]


def test_replicas_of_different_heads_are_found_out(hosts, alone):
    panels = anew(alone[0], hosts, 2)
    other = {name: dict(group) for name, group in panels[0].state().items()}
    other["critics-0"]["bank0.rows"] = other["critics-0"]["bank0.rows"] + 1.0
    packed = {name: pack_state(group) for name, group in other.items()}
    ray.get(hosts[1].actor.load.remote(packed, STEPS), timeout=240)
    with pytest.raises(RuntimeError, match="critics-0-1 holds other heads of critics-0"):
        panels[0].digests()


def test_a_rank_whose_peers_never_ask_gives_up(hosts, alone):
    """The host is well, but waits for what the other replica learns: no repetition helps, nor is endless."""
    anew(alone[0], hosts, 2)
    panel = remote_panel(alone[0], hosts, 0, 2, patience=2.0)
    images, labels = torch.zeros(8, 1, 8, 8), torch.arange(8)
    with pytest.raises(Failure, match=r"verdict of critics-0-0: 0 of 1 finished within [\d.]+ s"):
        panel.ask(Samples(0, images, images, labels), torch.arange(8) % 4).result()
    assert panel.recoveries == 0


@pytest.mark.slow
def test_a_collective_group_gives_the_same_heads_and_is_begun_anew_after_a_loss(
    ray_cluster, tiny_teacher, tmp_path
):
    recipe = panel_recipe(tiny_teacher, noise_levels=(250,), levels_per_step=1)
    hosts = start_hosts(recipe, [(0,)], tmp_path, ranks=2, replicas=2, transport="gloo")
    panels = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)]
    whole = local_panel(recipe)
    for number in range(4):
        gradient, _ = step(panels, number)
        torch.testing.assert_close(gradient, step([whole], number)[0], atol=1e-5, rtol=0.0)
    told, state = digests(hosts), panels[0].state()
    assert told[0] == told[1]
    for key, tensor in whole.state()["critics-0"].items():
        assert torch.allclose(state["critics-0"][key].float(), tensor.float(), atol=1e-4), key
    slay(hosts[1])
    with pytest.raises(Failure) as lost:
        step(panels, 4)
    assert lost.value.kind == "infrastructure"
    # What trainers do that go back to a checkpoint.
    again = [remote_panel(recipe, hosts, rank, 2) for rank in range(2)]
    for panel in again[::-1]:
        panel.load(state, 4)
    assert digests(hosts) == told
    gradient, _ = step(again, 4)
    torch.testing.assert_close(gradient, step([whole], 4)[0], atol=1e-5, rtol=0.0)
    kill(hosts)


@pytest.mark.skipif(find_spec("nixl") is None, reason="needs the package nixl")
def test_gradients_by_nixl_are_those_by_the_object_store_whatever_dies(ray_cluster, alone, tmp_path):
    recipe, gradients, _, _ = alone
    hosts = start_hosts(recipe, SHARES, tmp_path, transport="nixl")
    panel = remote_panel(recipe, hosts)
    for number in range(STEPS):
        if number == 10:
            slay(hosts[0])
        gradient, _ = step([panel], number)
        torch.testing.assert_close(gradient, gradients[number], atol=1e-5, rtol=0.0)
    assert panel.recoveries > 0
    kill(hosts)


def test_nixl_without_its_package_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    critics = HostedCriticsConfig(transport="nixl")
    recipe = PanelRecipe("teacher", CriticsConfig(), NoiseConfig(), 0)
    asked = stage.cast(recipe, critics, None, EvaluatorsConfig(), TrainerConfig(), "run")
    with pytest.raises(ValueError, match=r"critics\.transport=nixl needs the package nixl") as refused, asked:
        pass
    assert "\n" not in str(refused.value)


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
    ],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig.model_validate(options)
    with pytest.raises(ValueError, match="keeps the critics in the trainer, with no wire"):
        HostedCriticsConfig(actors=0, wire_dtype="bfloat16")

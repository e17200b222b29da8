"""Every strategy trains the same network, and goes on from any other's checkpoint at any world size."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from strategy_parts import (
    ADAPTED,
    ADAPTED_STEPS,
    ALONE,
    BEFORE,
    COMPILED,
    CUT,
    POLICIES,
    POLICY_STEPS,
    SHORT,
    SHORT_STEPS,
    SLOW,
    STEPS,
    STRATEGIES,
    adapted,
    alone,
    difference,
    load,
    run,
    save,
    student,
    tensors,
    work,
)
from tiny_jobs import distill_config, train_config
from tiny_policies import policy_config

from actors.trainers import TeacherRecipe
from actors.training import StopSignal, TrainerConfig, train_here
from actors.worker import LoopSpec
from cluster.checkpoints import (
    DamagedCheckpointError,
    checkpoint_group,
    latest_checkpoint,
    load_checkpoint,
)
from cluster.storage import RunStore
from counterpoint.optimization import OptimizerConfig
from counterpoint.place import Place
from counterpoint.section import Section
from counterpoint.strategies.build import build_learner
from counterpoint.strategies.config import StrategyConfig, check_installed
from counterpoint.strategies.learner import Learner
from jobs.config import dump_config, parse_config

CLOSE = 1e-4


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


policies = partial(policy_config, demonstrations=Path("demonstrations"))


pytestmark = pytest.mark.timeout(900)  # the first test waits for all trainings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Path]:
    """What one process and then two have left of all trainings that the chosen tests look at."""
    root = tmp_path_factory.mktemp("strategies")
    all_of_them = any(
        item.path == request.path and item.get_closest_marker("slow") for item in request.session.items
    )
    alone(root)
    torch.multiprocessing.spawn(work, (str(root), set() if all_of_them else SLOW), nprocs=2)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("name", marked(STRATEGIES))
def test_two_processes_end_with_the_student_of_one(folder: Path, name: str) -> None:
    assert difference(tensors(folder / name), tensors(folder / ALONE)) < CLOSE


def test_deepspeed_compiles_nothing(folder: Path) -> None:
    """Without a GPU it would compile a collective that only inference asks for."""
    assert not (folder / COMPILED).exists()


@pytest.mark.parametrize("name", marked(STRATEGIES))
def test_each_rank_has_written_its_share(folder: Path, name: str) -> None:
    checkpoint = load_checkpoint(RunStore(str(folder / name)), CUT)
    for group in ("unet", "optimizer"):
        sizes = [(folder / name / file).stat().st_size for file in checkpoint.files[group]]
        assert len(sizes) == 2
        assert max(sizes) < 1.5 * min(sizes)
    assert len(checkpoint.files["weights"]) == len(checkpoint.files["critics-0"]) == 1
    assert checkpoint.tensors("unet").keys() == checkpoint.stored("unet").keys()


@pytest.mark.parametrize("name", marked(STRATEGIES))
def test_one_process_goes_on_from_the_checkpoint_of_two(folder: Path, tmp_path: Path, name: str) -> None:
    trainer = student(Place())
    load(trainer, folder / name, CUT)
    run(trainer, CUT, STEPS)
    save(trainer, tmp_path, STEPS)
    assert difference(tensors(tmp_path), tensors(folder / ALONE)) < CLOSE


@pytest.mark.parametrize("name", marked(STRATEGIES))
def test_two_processes_go_on_from_the_checkpoint_of_one(folder: Path, name: str) -> None:
    assert difference(tensors(folder / f"{name}-from-{ALONE}"), tensors(folder / ALONE)) < CLOSE


@pytest.mark.parametrize("name", marked(STRATEGIES))
def test_a_strategy_goes_on_from_the_checkpoint_of_another(folder: Path, name: str) -> None:
    resumed = tensors(folder / f"{name}-from-{BEFORE[name]}")
    assert difference(resumed, tensors(folder / ALONE)) < CLOSE
    if BEFORE[name] == name:
        assert difference(resumed, tensors(folder / name)) == 0


@pytest.mark.parametrize("name", marked(SHORT))
def test_savings_train_nearly_the_same_teacher(folder: Path, name: str) -> None:
    found, wanted = (tensors(folder / "teacher" / n, SHORT_STEPS) for n in (name, ALONE))
    assert {x.dtype for key, x in found.items() if key.startswith("unet")} == {torch.float32}
    apart = difference(found, wanted)
    if "bf16" in name:
        # Roundings differ by 2 ** -8; what bf16 changes must be seen, or it was not in force.
        assert 1e-5 < apart < 0.05
    else:
        assert apart < CLOSE


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("end", ["", "-resumed"])
def test_a_policy_trains_through_both_stages(folder: Path, name: str, end: str) -> None:
    found = tensors(folder / "policy" / f"{name}{end}", POLICY_STEPS)
    assert difference(found, tensors(folder / "policy" / ALONE, POLICY_STEPS)) < CLOSE


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_train_beside_weights_that_do_not(folder: Path, name: str) -> None:
    found, wanted = (tensors(folder / "adapted" / n, ADAPTED_STEPS) for n in (name, ALONE))
    assert sum(key.startswith("optimizer/exp_avg.") for key in found) < len(found) / 8
    assert difference(found, wanted) < CLOSE


def test_frozen_weights_that_are_made_again_are_not_stored_but_must_be_the_same() -> None:
    def learner(seed: int) -> Learner:
        network = adapted(seed)
        for p in network.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        return build_learner(network, OptimizerConfig(), 9, frozen="rebuilt")

    one, same, other = learner(0), learner(0), learner(1)
    one.step(0)
    weights, state = one.weights(), one.state()
    assert weights.keys() == one.averaged().keys()
    assert all("lora" in name for name in weights)
    same.load(weights, state)
    assert all(torch.equal(x, same.module.state_dict()[name]) for name, x in one.module.state_dict().items())
    with pytest.raises(ValueError, match=r"the frozen weights are not those .* give the run the teacher"):
        other.load(weights, state)


def test_a_corrupted_part_is_named_and_the_checkpoint_before_it_is_used(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = shutil.copytree(folder / "zero3", tmp_path / "run")
    store = RunStore(str(run_folder))
    part = run_folder / load_checkpoint(store, STEPS).files["unet"][1]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"unet\.part-1\.safetensors does not match its"):
        load_checkpoint(store, STEPS)
    with pytest.raises(DamagedCheckpointError, match=r"unet\.part-1\.safetensors does not match"):
        checkpoint_group(store, STEPS, "unet")
    newest = latest_checkpoint(store)
    assert newest is not None
    assert newest.step == CUT
    assert "unet.part-1.safetensors does not match its checksum" in caplog.text
    part.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"unet\.part-1\.safetensors is missing"):
        load_checkpoint(store, STEPS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": {"offload": True}}, "offload=true with name=ddp: .* set name=fsdp or name=deepspeed"),
        ({"strategy": {"name": "fsdp", "zero_stage": 3}}, "zero_stage=3 with name=fsdp: only deepspeed"),
        ({"strategy": {"name": "fsdp"}, "workers": 0}, "strategy.name=fsdp with workers=0: .* set workers"),
        ({"strategy": {"name": "zero"}}, "'ddp', 'fsdp' or 'deepspeed'"),
        ({"strategy": {"name": "deepspeed", "zero_stage": 4}}, "1, 2 or 3"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig.model_validate(settings)
    assert StrategyConfig().sharded is False


def test_a_checkpoint_says_how_it_came_about_and_who_goes_on_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    c = train_config(tmp_path, teacher={"steps": 3, "batch_size": 16})
    recipe = TeacherRecipe(c.data, c.unet, c.noise, c.teacher, c.seed)
    here = TrainerConfig(workers=0, threads=1)
    spec = LoopSpec(str(tmp_path), recipe, checkpoint_every=2)
    assert train_here(spec, here, lambda figures: None, StopSignal(asked=True)).steps == 1
    checkpoint = latest_checkpoint(RunStore(str(tmp_path)))
    assert checkpoint is not None
    assert checkpoint.meta == {"samples": 16, "workers": 1, "strategy": "ddp fp32"}
    bf16 = here.model_copy(update={"strategy": StrategyConfig(precision="bf16")})
    with caplog.at_level("INFO"):
        train_here(spec, bf16, lambda figures: None, StopSignal())
    told = "resumed from step 1 (16 samples), written by 1 worker under ddp fp32, now 1 worker under ddp bf16"
    assert told in caplog.messages
    ended = latest_checkpoint(RunStore(str(tmp_path)))
    assert ended is not None
    assert (ended.step, ended.meta["samples"]) == (3, 48)


@pytest.mark.parametrize("strategy", [{}, STRATEGIES["zero3"], STRATEGIES["fsdp"] | {"offload": True}])
@pytest.mark.parametrize("make", [train_config, partial(distill_config, teacher="t"), policies])
def test_a_stored_configuration_is_read_again_as_it_was(
    tmp_path: Path, make: Callable[..., Section], strategy: dict[str, object]
) -> None:
    """It names every field, those that another strategy has no use for among them."""
    config = make(tmp_path / "run", trainer={"workers": 1, "strategy": strategy})
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_config(config))
    assert "zero_stage: " in stored.read_text()
    assert parse_config(type(config), [str(stored)]) == config


def test_what_deepspeed_needs_is_asked_for_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="deepspeed is not installed: pip install"):
        check_installed(StrategyConfig(name="deepspeed"))
    check_installed(StrategyConfig(name="fsdp"))

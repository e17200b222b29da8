"""Checkpoints to serve: names lead nowhere but below the root, and only what is whole is loaded."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DModel
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toy_policy import toy_bundle

from actors.serving.checkpoints import check, load_images, load_policy, locate, seal_run
from cluster.checkpoints import checkpoint_steps, load_checkpoint, save_checkpoint
from cluster.sealing import save_sealed, verify
from cluster.storage import RunStore
from counterpoint.policies.bundle import PolicyBundle
from counterpoint.scheduler import TimestepShiftScheduler
from jobs.rollout_policies import fingerprint

CPU = torch.device("cpu")
WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"


def copied(run: str, target: Path) -> None:
    """Copy what of a run is served."""
    for part in ("pipeline", "policy", "checkpoints"):
        if (Path(run) / part).exists():
            shutil.copytree(Path(run) / part, target / part)


@pytest.fixture
def root(tmp_path: Path, tiny_run: str) -> Path:
    """A service's root with the run `digits/student`."""
    copied(tiny_run, tmp_path / "root/digits/student")
    return tmp_path / "root"


@pytest.fixture
def policies(tmp_path: Path, tiny_policy: str) -> Path:
    """A service's root with the run `base`."""
    copied(tiny_policy, tmp_path / "root/base")
    return tmp_path / "root"


def load(root: object, name: str = "digits/student"):
    """The image model of a checkpoint, with batches of one row, so that little is tried."""
    return load_images(locate(str(root), name), 1, True, CPU)


def refused(root: object, name: str = "digits/student", act: Callable = load) -> str:
    """The message with which a checkpoint is refused; it is one line and says nothing of the root."""
    with pytest.raises(ValueError) as caught:
        act(root, name)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) not in message
    assert "/tmp" not in message
    assert len(message) < 600
    return message


def same(state: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(state[name], reference[name]) for name in reference)


# Names


@pytest.mark.parametrize(
    ("name", "run", "step"),
    [
        ("student", "student", None),
        ("digits/student", "digits/student", None),
        ("digits/student@120", "digits/student", 120),
        ("a/b_c/d-e.f+g=h,i@0012", "a/b_c/d-e.f+g=h,i", 12),
        ("2024..x", "2024..x", None),
    ],
)
def test_a_name_is_a_run_below_the_root_and_a_step(tmp_path: Path, name: str, run: str, step: int) -> None:
    place = locate(str(tmp_path), name)
    assert (place.name, Path(place.uri), place.step) == (name, tmp_path / run, step)
    for remote in ("memory://models", "memory://models/"):
        assert locate(remote, name).uri == f"memory://models/{run}"
    assert locate("memory://", name).uri == f"memory://{run}"
    assert str(tmp_path) not in repr(place).replace(place.uri, "")


BAD_NAMES = [
    "", ".", "..", "/", "//", "~", "~root", "../x", "x/..", "x/../y", "x/../../y", "./x", "x/.", "x/./y",
    "/etc", "x/", "/x", "x//y", "x\\y", "..\\x", "C:\\x", "C:/x", "x\0", "\0", "x\n", "\nx", "x\r", "x y",
    " x", "x\t", "s3://x", "memory://x", "file:///etc", "x::y", "simplecache::x", "%2e%2e/x", "x%00", "%",
    "x*", "x?", "x[0]", "{x,y}", "x@", "@1", "@", "x@-1", "x@1.5", "x@1@2", "x@latest", "x@\u0661", "x@1/y",
    "x@1\n", "x@" + "9" * 13, "x" * 257, "x/" * 200 + "x", "\u2025/x", "\uff0e\uff0e/x", "x\u2215y",
    "\u202ex", "-x", "x/-y", "x/.hidden", ".hidden", "$HOME", "`x`", "x;y", "x|y", "x&y", "x'y", 'x"y',
    "x\udc80",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("remote", [False, True])
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path: Path, name: str, remote: bool) -> None:
    message = refused("memory://models" if remote else tmp_path, name, lambda at, it: locate(str(at), it))
    assert "is no name of a checkpoint: give RUN or RUN@STEP" in message
    assert "\0" not in message


PARTS = st.sampled_from(
    ["..", ".", "/", "\\", "~", "@", "1", "run", "link", "%2e", "\0", ":", "*", "\u2024", "a", "://", "etc"]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.one_of(st.lists(PARTS, max_size=8).map("".join), st.text(max_size=300)))
@example(name="run/link")
@example(name="link/root")
def test_no_name_at_all_leads_out_of_the_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    if not root.exists():
        (root / "run").mkdir(parents=True)
        (root / "link").symlink_to(tmp_path)
        (root / "run/link").symlink_to("/etc")
    message = ""
    try:
        assert Path(os.path.realpath(locate(str(root), name).uri)).is_relative_to(root)
    except ValueError as error:
        message = str(error)
    assert str(tmp_path) not in message
    assert len(message.splitlines()) <= 1


def test_a_link_out_of_the_root_is_refused_and_one_within_it_is_followed(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "digits/student", tmp_path / "elsewhere/student")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "up").symlink_to("../elsewhere/student")
    (root / "loop").symlink_to("loop")
    (root / "best").symlink_to("digits/student")
    for name in ("out/student", "up"):
        assert "leads out of the service's root" in refused(root, name)
    assert "checkpoint 'loop'" in refused(root, "loop")
    assert load(root, "best")[0].version.startswith("best@final-")


def test_a_root_that_is_a_link_itself_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert load(tmp_path / "alias")[0].version == load(root)[0].version


@pytest.mark.parametrize(
    "part", ["pipeline", "pipeline/unet", WEIGHTS, "checkpoints", "checkpoints/step-{step:08d}"]
)
def test_no_part_of_a_checkpoint_may_be_a_link_out_of_the_root(root: Path, tmp_path: Path, part: str) -> None:
    run = root / "digits/student"
    step = checkpoint_steps(RunStore(run))[-1]
    path = run / part.format(step=step)
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    name = f"digits/student@{step}"
    for act in (load, lambda at, it: check(locate(str(at), it), "images")):
        assert "leads out of the service's root" in refused(root, name, act)


def test_a_run_that_becomes_a_link_after_it_was_located_is_refused(root: Path, tmp_path: Path) -> None:
    place = locate(str(root), "digits/student")
    (root / "digits/student").rename(tmp_path / "moved")
    (root / "digits/student").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="leads out of the service's root"):
        load_images(place, 1, True, CPU)


# Images


def test_a_finished_run_is_loaded_as_it_was_saved(root: Path) -> None:
    model, created = load(root)
    saved = UNet2DModel.from_pretrained(root / "digits/student/pipeline/unet", low_cpu_mem_usage=False)
    assert same(model.unet.state_dict(), saved.state_dict())
    assert isinstance(model.scheduler, TimestepShiftScheduler)
    assert not model.unet.training
    seal = verify(RunStore(root / "digits/student"), "pipeline")
    assert model.version == f"student@final-{seal.digest[:12]}"
    assert created == seal.created
    assert check(locate(str(root), "digits/student"), "images") == model.version


def test_a_step_replaces_the_weights(root: Path) -> None:
    store = RunStore(root / "digits/student")
    final = load(root)[0]
    versions = {final.version}
    for step in checkpoint_steps(store):
        name = f"digits/student@{step}"
        model, created = load(root, name)
        assert same(model.unet.state_dict(), load_checkpoint(store, step).tensors("weights"))
        assert model.version.startswith(f"student@{step}-")
        assert check(locate(str(root), name), "images") == model.version
        manifest = root / f"digits/student/checkpoints/step-{step:08d}/manifest.json"
        assert created == int(manifest.stat().st_mtime)
        versions.add(model.version)
    assert len(versions) == len(checkpoint_steps(store)) + 1
    first = load(root, f"digits/student@{checkpoint_steps(store)[0]}")[0]
    assert not same(first.unet.state_dict(), final.unet.state_dict())


def test_the_version_names_the_content(root: Path) -> None:
    store = RunStore(root / "digits/student")
    step = checkpoint_steps(store)[-1]
    before = load(root, f"digits/student@{step}")[0].version
    weights = load_checkpoint(store, step).tensors("weights")
    save_checkpoint(store, step, {"weights": weights}, {})
    assert load(root, f"digits/student@{step}")[0].version == before
    save_checkpoint(store, step, {"weights": {name: w + 1 for name, w in weights.items()}}, {})
    assert load(root, f"digits/student@{step}")[0].version != before


def test_a_remote_root_serves_the_same_and_fetches_each_file_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = f"memory://{uuid.uuid4().hex}/models"
    store = RunStore(f"{remote}/digits/student")
    store.write_folder("pipeline", root / "digits/student/pipeline")
    store.write_folder("checkpoints", root / "digits/student/checkpoints")
    assert load(remote)[0].version == load(root)[0].version
    name = f"digits/student@{checkpoint_steps(store)[-1]}"
    read = [_count(monkeypatch, store.fs, method) for method in ("get_file", "cat_file", "_open")]
    model = load(remote, name)[0]
    # Each file of the pipeline, the step's manifest and its weights: what was checked is what was loaded.
    files = [*store.list("pipeline"), *(name for name in store.list("checkpoints") if "manifest" in name)]
    assert len(read[0]) == len(store.list("pipeline"))
    assert sorted(read[1]) == sorted(set(read[1]))
    assert len(read[1]) == 2
    assert len(read[2]) <= len(files) + 2
    assert same(model.unet.state_dict(), load(root, name)[0].unet.state_dict())
    assert check(locate(remote, name), "images") == model.version


def _count(monkeypatch: pytest.MonkeyPatch, fs: object, method: str) -> list[str]:
    called, original = [], getattr(fs, method)

    def counting(path: str, *arguments: object, **options: object) -> object:
        called.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(fs, method, counting)
    return called


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


PIPELINE_FILES = [
    WEIGHTS, "pipeline/unet/config.json", "pipeline/model_index.json",
    "pipeline/scheduler/scheduler_config.json", "pipeline/manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("file", PIPELINE_FILES)
def test_a_damaged_pipeline_is_named_and_not_loaded(
    root: Path, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    path = root / "digits/student" / file
    damage(path)
    for act in (load, lambda at, it: check(locate(str(at), it), "images")):
        message = refused(root, act=act)
        assert f"checkpoint 'digits/student': {file} " in message
        assert str(path) in caplog.text, "whoever runs the service is told where"


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
def test_a_damaged_step_is_named_and_not_loaded(
    root: Path, file: str, damage: Callable[[Path], None]
) -> None:
    step = checkpoint_steps(RunStore(root / "digits/student"))[-1]
    damage(root / f"digits/student/checkpoints/step-{step:08d}/{file}")
    for act in (load, lambda at, it: check(locate(str(at), it), "images")):
        message = refused(root, f"digits/student@{step}", act)
        assert f"checkpoints/step-{step:08d}/{file} " in message
    load(root)  # what the run ended with is whole


def test_weights_of_another_run_are_refused(root: Path, tiny_teacher: str) -> None:
    shutil.copyfile(Path(tiny_teacher) / WEIGHTS, root / "digits/student" / WEIGHTS)
    assert "does not match its checksum" in refused(root)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "unet/model.safetensors", "extra.json"])
def test_a_file_that_was_not_sealed_is_refused(root: Path, name: str) -> None:
    (root / "digits/student/pipeline" / name).write_bytes(b"{}")
    assert f"pipeline/{name} is no part of what was sealed" in refused(root)


def test_what_is_missing_is_told_in_words(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    for name in ("nothing", "empty", "digits", "file"):
        message = refused(root, name)
        assert f"checkpoint '{name}': pipeline" in message
    assert "jobs.serve seal RUN" in refused(root, "empty")
    assert "checkpoints/step-00999999/manifest.json is missing" in refused(root, "digits/student@999999")
    assert "checkpoint 'nothing': pipeline" in refused(f"memory://{uuid.uuid4().hex}", "nothing")
    assert "policy/manifest.json is missing" in refused(
        root, act=lambda at, it: load_policy(locate(str(at), it), CPU)
    )


def test_files_that_are_whole_but_make_no_model_are_refused(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = root / "digits/student"
    shutil.copytree(run / "pipeline", tmp_path / "source")
    (tmp_path / "source/manifest.json").unlink()
    config = tmp_path / "source/unet/config.json"
    wide = json.loads(config.read_text()) | {"block_out_channels": [32, 32]}
    config.write_text(json.dumps(wide))
    save_sealed(RunStore(run), "pipeline", tmp_path / "source")
    message = refused(root)
    assert "does not load although its files are whole" in message
    assert "Traceback" in caplog.text, "whoever runs the service is told why"
    config.unlink()
    save_sealed(RunStore(run), "pipeline", tmp_path / "source")
    assert "does not load although its files are whole" in refused(root)


def test_weights_of_a_step_that_do_not_fit_are_refused(root: Path) -> None:
    save_checkpoint(RunStore(root / "digits/student"), 77, {"weights": {"w": torch.ones(2)}}, {})
    save_checkpoint(RunStore(root / "digits/student"), 78, {"other": {"w": torch.ones(2)}}, {})
    assert "does not load" in refused(root, "digits/student@77")
    assert "names no 'weights'" in refused(root, "digits/student@78")


def test_weights_are_never_unpickled(root: Path, tmp_path: Path) -> None:
    run = root / "digits/student"
    shutil.copytree(run / "pipeline", tmp_path / "source")
    (tmp_path / "source/manifest.json").unlink()
    weights = tmp_path / "source/unet/diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    save_sealed(RunStore(run), "pipeline", tmp_path / "source")
    assert "does not load" in refused(root)


# Policies


def test_a_policy_is_loaded_as_it_was_saved_or_with_the_weights_of_a_step(policies: Path) -> None:
    store = RunStore(policies / "base")
    saved = PolicyBundle.load(policies / "base/policy")
    bundle, version, created = load_policy(locate(str(policies), "base"), CPU)
    assert same(bundle.policy.state_dict(), saved.policy.state_dict())
    assert np.array_equal(bundle.sample, saved.sample)
    seal = verify(store, "policy")
    assert (version, created) == (f"base@final-{seal.digest[:12]}", seal.created)
    assert check(locate(str(policies), "base"), "actions") == version
    step = checkpoint_steps(store)[-1]
    weights = load_checkpoint(store, step).tensors("weights")
    save_checkpoint(store, 77, {"weights": {name: w + 1 for name, w in weights.items()}}, {})
    place = locate(str(policies), "base@77")
    bundle, version, _ = load_policy(place, CPU)
    assert same(bundle.policy.state_dict(), load_checkpoint(store, 77).tensors("weights"))
    assert version.startswith("base@77-")
    assert check(place, "actions") == version


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize(
    "file", ["model.safetensors", "policy.json", "words/tokenizer.json", "actions/action_tokenizer.json"]
)
def test_a_damaged_policy_is_named_and_not_loaded(
    policies: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(policies / "base/policy" / file)
    message = refused(policies, "base", lambda at, it: load_policy(locate(str(at), it), CPU))
    assert f"checkpoint 'base': policy/{file} " in message


def test_a_whole_policy_of_another_format_is_refused_without_paths(policies: Path, tmp_path: Path) -> None:
    toy_bundle().save(tmp_path / "source")
    manifest = tmp_path / "source/policy.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    save_sealed(RunStore(policies / "base"), "policy", tmp_path / "source")
    assert "does not load" in refused(policies, "base", lambda at, it: load_policy(locate(str(at), it), CPU))


# Runs from before there were seals


def test_an_older_run_is_sealed_once_and_then_checked(root: Path) -> None:
    run = root / "digits/student"
    before = verify(RunStore(run), "pipeline").digest
    (run / "pipeline/manifest.json").unlink()
    assert seal_run(str(run)) == {"images": before}
    load(root)
    content = (run / "pipeline/manifest.json").read_bytes()
    assert seal_run(str(run)) == {"images": before}
    assert (run / "pipeline/manifest.json").read_bytes() == content
    flip(run / WEIGHTS)
    with pytest.raises(ValueError, match="does not match its checksum"):
        seal_run(str(run))


def test_sealing_a_policy_makes_no_other_policy_of_it(policies: Path) -> None:
    run = policies / "base"
    (run / "policy/manifest.json").unlink()
    before = fingerprint(str(run))
    assert seal_run(str(run)).keys() == {"actions"}
    assert fingerprint(str(run)) == before


def test_damage_is_not_sealed(root: Path, policies: Path) -> None:
    truncate(root / "digits/student" / WEIGHTS)
    (root / "digits/student/pipeline/manifest.json").unlink()
    truncate(policies / "base/policy/model.safetensors")
    (policies / "base/policy/manifest.json").unlink()
    for run in (root / "digits/student", policies / "base"):
        with pytest.raises(ValueError, match="does not load, and is not sealed"):
            seal_run(str(run))
    with pytest.raises(ValueError, match="has nothing to serve"):
        seal_run(str(root / "nothing"))

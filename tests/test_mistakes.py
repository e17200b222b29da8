"""What users do wrong ends in one line, soon, with exit code 2: field, value and remedy, and no traceback."""

import re
import shutil
import time

import pytest
import ray
from test_doctor import await_node, can_unshare, free_port, node
from tiny_jobs import CRITICS, distill_config

from cluster.checkpoints import checkpoint_steps, step_folder
from cluster.storage import RunStore
from jobs import distill
from jobs.config import dump_config, run_job
from jobs.settings import DistillConfig

WORKERS = {"trainer": {"workers": 1, "threads": 1, "checkpoint_every": 5}, "critics": CRITICS | {"actors": 1}}


def refusal(capsys, config_file, *overrides, seconds=120.0):
    """The one line with which `python -m jobs.distill` refuses, within `seconds`."""
    begun = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        run_job(distill.main, DistillConfig, [str(config_file), *overrides])
    assert time.monotonic() - begun < seconds
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert "Traceback" not in printed.err
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert printed.err.rstrip().endswith(line)
    return line


def written(folder, teacher):
    """The file of a small distillation by one worker and one critic host."""
    file = folder / "student.yaml"
    file.write_text(dump_config(distill_config(folder / "run", teacher, **WORKERS)))
    return file


@pytest.fixture
def config_file(tiny_teacher, tmp_path):
    return written(tmp_path, tiny_teacher)


MISTAKES = {
    "critics.headz=3": r"critics\.headz = 3.*(nearest|valid)",
    "trainer.workers=-1": r"trainer\.workers.*-1",
    "trainer.strategy.name=zero": r"trainer\.strategy\.name.*zero.*deepspeed",
    "trainer.strategy.zero_stage=4": r"trainer\.strategy\.zero_stage.*4",
    "trainer.strategy.zero_stage=3": r"zero_stage=3 with name=ddp.*set name=deepspeed",
    "trainer.strategy.offload=true": r"offload=true with name=ddp.*set name=fsdp",
    "adversarial.optimizer.name=muon trainer.strategy.name=deepspeed": r"optimizer\.name.*muon.*adamw",
    "critics.replicas=2": r"critics\.replicas=2 does not divide trainer\.workers=1",
    "critics.actors=0 trainer.workers=2": r"critics\.actors=0 .*trainer\.workers=2.*set critics\.actors to 1",
    "adversarial.batch_size=15 trainer.workers=2": r"adversarial\.batch_size.*15",
    "run=memory://run": r"run=memory://run .*use a path or an object store",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_is_one_line(mistake, config_file, capsys):
    line = refusal(capsys, config_file, *mistake.split())
    assert re.search(MISTAKES[mistake], line), line


def flip(store, step):
    """Change one byte in the middle of a checkpoint's largest file."""
    names = [name for name in store.list(step_folder(step)) if name.endswith(".safetensors")]
    largest = max(names, key=lambda name: len(store.read_bytes(name)))
    content = bytearray(store.read_bytes(largest))
    content[len(content) // 2] ^= 1
    store.write_bytes(largest, bytes(content))
    return largest


def test_damaged_checkpoints_are_named_before_anything_starts(tiny_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    store = RunStore(str(run))
    file = tmp_path / "student.yaml"
    text = store.read_text("config.yaml").replace(tiny_run, str(run))
    file.write_text(text)
    flipped = [flip(store, step) for step in checkpoint_steps(store)]
    line = refusal(capsys, file, "resume=true")
    assert f"run={run} cannot be resumed, none of its {len(flipped)} checkpoints is whole" in line
    assert flipped[-1] in line
    assert "restore that file" in line


FAULTS = {
    "a library of another version": (
        'export PYTHONPATH="{folder}:$PYTHONPATH"', r"deepspeed is .*0\.1\.2 on .*constraints\.txt",
    ),
    "a storage path of its own": ('mount -t tmpfs none "{folder}"', r"cannot see what .* wrote .*s3://"),
}  # fmt: skip


@pytest.mark.skipif(not can_unshare(), reason="needs unshare --mount, which needs root")
@pytest.mark.slow  # test_doctor lets the same check find both
@pytest.mark.parametrize("fault", FAULTS)
def test_a_node_that_cannot_take_part_is_named(fault, fake_cluster, config_file, tmp_path, capsys):
    shell, expected = FAULTS[fault]
    folder = tmp_path / "faulty"
    other = folder / "deepspeed-0.1.2.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1.2\n")
    before = len([one for one in ray.nodes() if one["Alive"]])
    with node(fake_cluster.address, (free_port(), free_port()), shell.format(folder=folder)) as process:
        name = await_node(process)
        line = refusal(capsys, config_file, f"run={folder}/run", seconds=300.0)
    assert re.search(expected, line), line
    assert name in line
    deadline = time.monotonic() + 240
    while len([one for one in ray.nodes() if one["Alive"]]) > before:
        assert time.monotonic() < deadline
        time.sleep(0.2)

"""The last words of a failed run: the first cause, whole and once, and what to do about it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray import train
from ray.exceptions import WorkerCrashedError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from cluster import identity
from cluster.checkpoints import save_checkpoint
from cluster.failures import Failure, located, reporting
from cluster.first_cause import first_cause
from cluster.reserve import PlacementError
from cluster.storage import RunStore
from cluster.waiting import get
from counterpoint.section import Section
from jobs.config import run_job
from jobs.failure_card import card_of, remedy


@pytest.fixture(autouse=True)
def _no_run(monkeypatch):
    monkeypatch.setattr(identity, "_process", identity._Process())


class Job(Section):
    steps: int = 1


def raised(error, rank, at=None):
    """An exception as Ray Train hands it on from a rank."""
    located(error, "trainer", rank, f"host/{rank}")
    if at is not None:
        error.place["time"] = at
    story = (
        f'Traceback (most recent call last):\n  File "/x/actors/worker.py", line {rank}, in run\n{error!r}'
    )
    return pickle.loads(pickle.dumps(UserExceptionWithTraceback(error, story)))


def group(**failures):
    return train.WorkerGroupError("a long snippet", {int(k[1:]): e for k, e in failures.items()})


def test_the_worst_rank_is_the_cause_and_the_first_among_equals():
    lost = raised(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), 0, at=1.0)
    later, sooner = raised(KeyError("late"), 1, at=3.0), raised(KeyError("soon"), 2, at=2.0)
    error = group(r0=lost, r1=later, r2=sooner)
    error.add_note("student: gave up after 2 attempts in 9.0 s")
    cause = first_cause(error)
    assert (cause.kind, cause.original, cause.rank, cause.node) == ("code", "KeyError", 2, "host/2")
    assert "line 2, in run" in cause.story
    assert "line 1, in run" not in cause.story
    assert [line.partition(":")[0] for line in cause.others] == ["rank 0", "rank 1"]
    assert cause.notes == ("student: gave up after 2 attempts in 9.0 s",)


def test_a_hosts_failure_that_ends_a_trainer_is_the_hosts():
    failure = Failure("code", "no such head", "critics-1", 40, "KeyError", "the host's traceback", "host/ab")
    copy = pickle.loads(pickle.dumps(failure))
    assert (copy.node, str(copy)) == ("host/ab", str(failure))
    cause = first_cause(group(r0=UserExceptionWithTraceback(failure, "the rank's traceback")))
    assert (cause.role, cause.rank, cause.node, cause.step) == ("critics", 1, "host/ab", 40)
    assert cause.story == "the host's traceback"


def test_what_an_actor_raises_has_its_own_traceback(ray_cluster):
    @ray.remote(num_cpus=0)
    class Host:
        @reporting("critics-3")
        def judge(self, step):
            return {}[step]

        def plain(self):
            raise ArithmeticError("plainly")

    host = Host.remote()
    for call, named in ((host.judge.remote(7), "KeyError"), (host.plain.remote(), "ArithmeticError")):
        with pytest.raises(Exception, match=r"7|plainly") as caught:
            get(call, timeout=240.0, what="a judgement")
        cause = first_cause(caught.value)
        assert cause.original == named
        assert cause.story.count("Traceback (most recent call last)") <= 1
        assert ("in judge" in cause.story) or ("in plain" in cause.story)
        assert cause.node
    ray.kill(host)


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, by name."""


OutOfMemoryError.__module__ = "torch"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "GPU's memory is full"),
        (ray.exceptions.OutOfMemoryError("killed due to memory pressure"), "machine's memory is full"),
        (MemoryError(), "machine's memory is full"),
        (WorkerCrashedError(), "ended without a word"),
        (ray.exceptions.NodeDiedError("gone"), "left the cluster"),
        (PlacementError("the plan can never fit this cluster"), "ask for less"),
        (OSError(28, "No space left on device"), "storage refused"),
        (PermissionError(13, "Permission denied"), "storage refused"),
        (FloatingPointError("loss is nan at step 3"), "numbers went wrong"),
        (TimeoutError("no answer"), "did not answer in time"),
        (Failure("data", "img_7.png: 3 bytes", "evaluators-0", None, "pkg.Bad", "told"), "data is broken"),
        (ConnectionError("reset"), "another place or moment"),
    ],
)
def test_each_cause_has_its_remedy(error, words):
    assert words in remedy(first_cause(error), "runs/x")


def test_our_mistakes_are_sent_to_the_line():
    def wrong():
        raise AttributeError("mistake")

    with pytest.raises(AttributeError) as caught:
        wrong()
    caught.value.__traceback__ = caught.tb
    cause = first_cause(caught.value)
    assert cause.role == "driver"
    assert "in wrong" in cause.story
    told = remedy(first_cause(raised(KeyError("x"), 4)), "runs/x")
    assert "worker.py:4" in told
    assert "run=runs/x resume=true" in told


def test_a_failed_job_ends_with_its_traceback_once_and_a_card(tmp_path, capsys):
    store = RunStore(str(tmp_path))

    def main(_):
        run = identity.begin(store)
        save_checkpoint(store, 5, {}, {})
        (tmp_path / "checkpoints/step-00000010").mkdir()
        run.figures = {"step": 8, "total": 20}
        run.rows = [{"role": "trainer", "rank": 1, "node": "host/cd", "pid": 77}]
        raise group(
            r0=raised(TimeoutError("peer"), 0), r1=UserExceptionWithTraceback(KeyError("x"), "story of 1")
        )

    with pytest.raises(SystemExit) as ended:
        run_job(main, Job, [])
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("story of 1") == 1
    assert "Traceback" not in told.err.partition("story of 1")[0]
    for words in (
        "KeyError: 'x' (code)",
        "trainer, rank 1",
        "host/cd, process 77",
        "8; newest whole checkpoint: step 5",
    ):
        assert words in told.err
    assert max(map(len, told.err.splitlines())) <= 130
    kept = json.loads(store.read_text("failure.json"))
    assert (kept["role"], kept["rank"], kept["node"], kept["checkpoint"]) == ("trainer", 1, "host/cd", 5)
    assert kept["traceback"] == "story of 1"
    assert identity.known_facts(store)["outcome"] == "failed"


@pytest.mark.slow  # two ranks in a driver of their own; test_training_ray raises what a rank raises
def test_a_rank_that_fails_on_a_cluster_is_told_whole_and_once(tmp_path):
    command = [
        sys.executable, str(Path(__file__).parent / "failing_run.py"), "rank", f"run={tmp_path}/run",
        "teacher.steps=6", "teacher.batch_size=16", "trainer.workers=2", "trainer.threads=1",
        "trainer.cpus_per_worker=0.4", "trainer.checkpoint_every=2", "unet.block_out_channels=[16,16]",
        "unet.norm_num_groups=8",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    told = done.stderr
    assert (done.returncode, done.stdout) == (1, ""), told
    assert told.count("Traceback (most recent call last)") == 1
    assert told.count("in stumble") == 1
    assert told.index("in stumble") < told.index("-- the run failed")
    card = told.partition("-- the run failed")[2]
    for words in (
        "KeyError: 'no such weight' (code)",
        "trainer, rank 1",
        "step 2",
        "mend the code at",
        "resume=true",
    ):
        assert words in card, told
    # Nothing of what Ray says about it is left beside the story and the card.
    before = told.partition("Traceback")[0]
    assert "no such weight" not in before
    assert "Error" not in before
    kept = json.loads((tmp_path / "run/failure.json").read_text())
    assert (kept["rank"], kept["last_step"], kept["checkpoint"]) == (1, 3, 2)
    assert "in stumble" in kept["traceback"]


def test_work_without_a_run_has_a_card_too():
    card = card_of(RuntimeError("a bench broke"))
    assert "a bench broke" in str(card)
    assert "last step" not in str(card)

"""Jobs sent to a cluster that wants a token: what is sent, what is refused, how they stop and go on."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from node_parts import until
from test_training_ray import largest_difference, logged_steps
from tiny_jobs import CRITICS, distill_config

from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore
from cluster.submission import Jobs, SubmissionError, last_result
from jobs import distill, submit
from jobs.config import dump_config, parse_config
from jobs.config_yaml import read_yaml

ROOT = Path(submit.__file__).parent.parent
BIN = Path(sys.executable).parent


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(token, **more):
    """A user's environment with the virtual environment active, and a token that Ray asks for."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    path = os.pathsep.join([str(BIN), kept["PATH"]])
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | told | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


@contextmanager
def head(token):
    """`ray start --head` on ports of its own; yields the dashboard's address."""
    port = free_port()
    files = tempfile.mkdtemp(prefix="ray-")
    options = {
        "port": free_port(), "dashboard-host": "127.0.0.1", "dashboard-port": port, "num-cpus": 2,
        "dashboard-agent-listen-port": free_port(), "node-ip-address": "127.0.0.1", "temp-dir": files,
        "include-dashboard": "true", "disable-usage-stats": None,
    }  # fmt: skip
    flags = [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", *flags],
        env=environment(
            token,
            PYTHONPATH=str(ROOT / "tests" / "forked"),
            RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.1",
            RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
            RAY_worker_niceness="0",
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await_dashboard(process, f"http://127.0.0.1:{port}", token)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(240)
        finally:
            process.kill()
            shutil.rmtree(files, ignore_errors=True)


def await_dashboard(process, address, token):
    deadline = time.monotonic() + 400
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, "ray start ended"
            assert time.monotonic() < deadline, "no dashboard"
            time.sleep(0.3)


def clone(folder):
    """A fresh clone of this repository with the changes that are not committed yet."""
    git = ["git", "-c", "safe.directory=*"]
    subprocess.run([*git, "clone", "--quiet", "--local", str(ROOT), str(folder)], check=True)
    listing = [*git, "-C", str(ROOT), "ls-files", "-mo", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.check_output(listing, text=True).split("\0")):
        target = folder / name
        target.unlink(missing_ok=True)
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target)
    return folder


def submission(folder, token, log, *arguments):
    """`python -m jobs.submit` as a user of the clone runs it, its standard error in the file `log`."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.submit", *arguments],
        cwd=folder, env=environment(token, PYTHONPATH=str(folder), MARK="passed on"), text=True,
        stdout=subprocess.PIPE, stderr=log.open("w"),
    )  # fmt: skip


def long_distillation(run, teacher, **critics):
    return distill_config(
        run, teacher, warmup={"steps": 6, "batch_size": 16}, steps=[1],
        adversarial={"heads_alone": 3, "steps": 80, "batch_size": 16}, critics=CRITICS | critics,
        trainer={"workers": critics["actors"], "threads": 1, "checkpoint_every": 10},
    )  # fmt: skip


@pytest.mark.timeout(1500)
def test_a_submitted_distillation_is_stopped_and_goes_on_from_a_fresh_clone(
    tiny_teacher, tmp_path, monkeypatch
):
    run, undisturbed, token = tmp_path / "run", tmp_path / "undisturbed", secrets.token_hex(16)
    config, wrong = tmp_path / "student.yaml", tmp_path / "wrong.yaml"
    config.write_text(dump_config(long_distillation(run, tiny_teacher, actors=1)))
    wrong.write_text(f"extends: {config.name}\ncritics: {{headz: 3}}\n")
    folder = clone(tmp_path / "clone")
    with head(token) as address:
        refused_without_token(address, tmp_path, monkeypatch)
        log, wrong_log = tmp_path / "log", tmp_path / "wrong.log"
        first = submission(
            folder, token, log, f"address={address}", "env=[MARK]", "--", "distill", str(config)
        )
        other = submission(folder, token, wrong_log, f"address={address}", "--", "distill", str(wrong))
        until(lambda: checkpoint_step(run) > 0 or first.poll() is not None, 500, "a checkpoint of the job")
        assert first.poll() is None, log.read_text()
        assert "of 89 steps to go" in log.read_text()  # while the job runs
        name = next(
            line.split("sent ")[1].split()[0] for line in log.read_text().splitlines() if "sent " in line
        )
        subprocess.run(
            [str(BIN / "ray"), "job", "stop", "--address", address, name],
            env=environment(token), check=True, capture_output=True, timeout=300,
        )  # fmt: skip
        assert first.wait(240) == 130, log.read_text()
        assert "resume=true goes on" in log.read_text()
        stopped_at = checkpoint_step(run)
        assert 0 < stopped_at < 89
        assert f'"stopped_at_step": {stopped_at}' in log.read_text()
        assert other.wait(400) == 2
        assert "error: unknown key critics.headz = 3" in wrong_log.read_text()
        again = subprocess.run(
            [
                str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".",
                "--runtime-env-json", json.dumps({"py_executable": sys.executable}),
                "--", sys.executable, "-m", "jobs.distill", str(config), "resume=true",
            ],
            cwd=folder, env=environment(token), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"goes on from its checkpoint of step {stopped_at}" in again.stdout
    distill.main(long_distillation(undisturbed, tiny_teacher, actors=0))
    assert largest_difference(str(run), str(undisturbed)) < 1e-4
    assert logged_steps(str(run)) == list(range(1, 90))
    told = last_result(again.stdout.splitlines())
    assert told["run"] == str(run)
    assert told["student_1_fd"] == json.loads((run / "results.json").read_text())["headline"]["student_1_fd"]


def checkpoint_step(run):
    """The step of the newest whole checkpoint, 0 before there is one."""
    newest = latest_checkpoint(RunStore(str(run)))
    return newest.step if newest else 0


def refused_without_token(address, home, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(SubmissionError, match=r"RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN") as caught:
        Jobs(address)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


def packed(folder, **options):
    config = submit.SubmitConfig(**options)
    submit.pack(config, folder)
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_code_and_configurations_are_sent_and_nothing_else(tmp_path, caplog):
    with caplog.at_level("INFO"):
        names = packed(tmp_path)
    assert {
        "jobs/submit.py",
        "jobs/report.html.jinja",
        "configs/digits/distill.yaml",
        "pyproject.toml",
    } <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {*submit.FOLDERS, *submit.FILES}
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    assert f"sending {len(names)} files" in caplog.text
    assert "the largest: " in caplog.text


def test_a_package_above_the_limit_is_refused_with_its_largest_files(tmp_path):
    with pytest.raises(SubmissionError, match=r"limit_mib=0\.01: .* MiB would be sent; the largest are \w+/"):
        packed(tmp_path, limit_mib=0.01)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "no/such/file"])
def test_what_is_not_of_the_project_is_not_sent(name, tmp_path):
    with pytest.raises(SubmissionError, match=f"also={name}: no file or folder of the project"):
        packed(tmp_path, also=[name])


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "OPENAI_API_KEY", "PGPASSWORD"]
)
def test_a_variable_that_looks_like_a_secret_is_not_sent(name, monkeypatch):
    monkeypatch.setenv(name, "hush")
    with pytest.raises(SubmissionError, match=f"env={name}: .* before `ray start`") as caught:
        submit.runtime_env(submit.SubmitConfig(env=[name]), "folder")
    assert "hush" not in str(caught.value)


def test_only_named_variables_are_sent(monkeypatch):
    monkeypatch.setenv("MARK", "passed on")
    monkeypatch.setenv("MONKEY", "stays here")
    config = submit.SubmitConfig(env=["MARK"], storage="s3://bucket/", stop_wait_s=90)
    sent = submit.runtime_env(config, "folder")
    assert sent["env_vars"] == {
        "MARK": "passed on", "COUNTERPOINT_STORAGE": "s3://bucket", "RAY_JOB_STOP_WAIT_TIME_S": "90",
    }  # fmt: skip
    with pytest.raises(SubmissionError, match="env=UNSET_HERE: not set"):
        submit.runtime_env(submit.SubmitConfig(env=["UNSET_HERE"]), "folder")


def test_a_configuration_from_elsewhere_is_sent_with_what_it_extends(tmp_path):
    (tmp_path / "base.yaml").write_text("run: s3://bucket/run\nseed: 3\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nseed: 4\n")
    folder = tmp_path / "package"
    folder.mkdir()
    verb, arguments = submit.packed_job(["distill", str(tmp_path / "mine.yaml"), "seed=5"], folder)
    assert (verb, arguments[1:]) == ("distill", ["seed=5"])
    assert read_yaml((folder / arguments[0]).read_text()) == {"run": "s3://bucket/run", "seed": 4}
    own = str(ROOT / "configs/digits/distill.yaml")
    assert submit.packed_job(["distill", own], folder) == ("distill", ["configs/digits/distill.yaml"])


def test_a_relative_run_lies_below_the_storage_that_was_named(monkeypatch):
    monkeypatch.setenv("COUNTERPOINT_STORAGE", "s3://bucket")
    assert parse_config(distill.DistillConfig, ["run=runs/x"]).run == "s3://bucket/runs/x"
    assert parse_config(distill.DistillConfig, ["run=/shared/x"]).run == "/shared/x"

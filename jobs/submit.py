"""Send a verb to a cluster, follow it, and end as it ends.

    python -m jobs.submit address=http://HEAD:8265 -- distill configs/digits/distill.yaml run=s3://bucket/student

What stands after `--` is what `python -m jobs.` would take here.
"""

import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from cluster.connect import ROOT
from cluster.submission import Ended, Jobs, SubmissionError, last_result
from counterpoint.section import Section
from jobs.config import INTERRUPTED, run_job
from jobs.config_source import read_file
from jobs.config_yaml import write_yaml
from jobs.run_names import STORAGE

logger = logging.getLogger(__name__)

FOLDERS = ("actors", "cluster", "configs", "counterpoint", "jobs")
FILES = ("constraints.txt", "pyproject.toml")
SENT = "submitted"
"""Folder of the package for configurations that lie outside the project."""
SECRET = re.compile(r"TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|PRIVATE|AUTH|(^|_)(API_?)?KEY(_|$)", re.I)
LARGEST = 5
MIB = 2**20


class SubmitConfig(Section):
    """Where a job is sent and what goes with it; the job itself stands after `--`."""

    address: str = ""
    """The dashboard's URL; RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265 if none is given."""
    env: tuple[str, ...] = ()
    """Names of variables of this shell that the job gets; Ray shows their values to whoever lists jobs."""
    storage: str = ""
    """Where a relative `run` lies: a folder that all nodes see, or a URI; none refuses relative ones."""
    python: str = ""
    """Python of the job and its workers; none takes the path of this one where a node has it, else the
    node's python3."""
    also: tuple[str, ...] = ()
    """Files and folders of the project to send beside its code and configurations."""
    limit_mib: float = Field(default=20.0, gt=0.0)
    """Most MiB that may be sent."""
    agent_wait_s: float = Field(default=120.0, ge=0.0)
    """Seconds to wait for a cluster that has just been started."""
    stop_wait_s: int = Field(default=60, ge=1)
    """Seconds that a stopped job has for its checkpoint before it is killed; Ray's own default is 3."""
    detach: bool = False
    """End once the job is sent, without following it."""
    follow: str = ""
    """Id of a job to follow instead of sending one."""
    stop_on_interrupt: bool = False
    """Ctrl-C stops the job too, and waits for its end; otherwise it goes on alone."""


def main(config: SubmitConfig, job: Sequence[str]) -> dict[str, Any]:
    """Send the job, show its output on standard error, and return its own last line.

    Ends the process with the entrypoint's exit code if that is not 0, and with 130 if the job was stopped.
    """
    if bool(config.follow) == bool(job):
        raise SubmissionError(
            "give either follow=ID or a job after --, as in "
            "`python -m jobs.submit -- distill configs/digits/distill.yaml`"
        )
    if config.follow:
        return followed(config, Jobs(config.address), config.follow)
    logging.getLogger("ray").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        verb, arguments = packed_job(job, Path(folder))
        pack(config, Path(folder))
        environment = runtime_env(config, folder)
        jobs = Jobs(config.address)
        python = environment["py_executable"]
        entrypoint = f"{python} -m {shlex.join([f'jobs.{verb}', *arguments])}"
        name = jobs.send(entrypoint, environment, {"verb": verb}, config.agent_wait_s)
    logger.info("sent %s to %s", name, jobs.address)
    if config.detach:
        return {"job": name, "follow_with": f"python -m jobs.submit follow={name}"}
    return followed(config, jobs, name)


def packed_job(job: Sequence[str], folder: Path) -> tuple[str, list[str]]:
    """Return the verb and its arguments, after putting configurations from elsewhere into the package.

    Such a file is written with all that it extends. Raises SubmissionError for an unknown verb.
    """
    verb, *arguments = job
    if not re.fullmatch(r"[a-z_]+", verb) or find_spec(f"jobs.{verb}") is None:
        raise SubmissionError(f"{verb} is no verb of jobs: give one such as distill or train after --")
    for index, argument in enumerate(arguments):
        if argument.startswith("--") or "=" in argument or not argument.endswith((".yaml", ".yml")):
            continue
        path = Path(argument).absolute()
        within = path.relative_to(ROOT) if path.is_relative_to(ROOT) else None
        if within is not None and within.parts[0] in FOLDERS:
            read_file(path)
            arguments[index] = str(within)
            continue
        sent = folder / SENT / f"{index}-{path.name}"
        sent.parent.mkdir(exist_ok=True)
        sent.write_text(write_yaml(read_file(path)), encoding="utf-8")
        arguments[index] = str(sent.relative_to(folder))
    return verb, arguments


def pack(config: SubmitConfig, folder: Path) -> None:
    """Copy what is sent into `folder`, and say how much it is; SubmissionError if it is too much."""
    for name in (*FOLDERS, *FILES, *config.also):
        source = (ROOT / name).resolve()
        if not source.is_relative_to(ROOT) or not source.exists():
            raise SubmissionError(f"also={name}: no file or folder of the project {ROOT}")
        for path in [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()):
            within = path.relative_to(ROOT)
            if any(part.startswith(".") or part == "__pycache__" for part in within.parts):
                continue
            target = folder / within
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    sizes = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values()) / MIB
    largest = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
    shown = ", ".join(f"{path} {sizes[path] / MIB:.2f} MiB" for path in largest)
    if total > config.limit_mib:
        raise SubmissionError(
            f"limit_mib={config.limit_mib:g}: {total:.1f} MiB would be sent; the largest are {shown}: leave "
            "them out and give the job a URI instead, or raise limit_mib"
        )
    logger.info("sending %d files, %.2f MiB; the largest: %s", len(sizes), total, shown)


def runtime_env(config: SubmitConfig, folder: str) -> dict[str, Any]:
    """Return Ray's runtime environment: the package, Python, and the named variables."""
    given = {"RAY_JOB_STOP_WAIT_TIME_S": str(config.stop_wait_s)}
    if config.storage:
        given[STORAGE] = config.storage.rstrip("/")
        if "://" not in config.storage and not Path(config.storage).is_absolute():
            raise SubmissionError(
                f"storage={config.storage}: give an absolute path or a URI such as s3://bucket"
            )
    for name in config.env:
        if SECRET.search(name):
            raise SubmissionError(
                f"env={name}: Ray shows a job's variables to whoever lists jobs; give a secret to the nodes "
                "themselves, before `ray start` or in a file there"
            )
        if name not in os.environ:
            raise SubmissionError(f"env={name}: not set in this shell; export it or leave it out")
        given[name] = os.environ[name]
    here = shlex.quote(sys.executable)
    python = shlex.quote(config.python) if config.python else f"$(command -v {here} || command -v python3)"
    return {"working_dir": folder, "py_executable": python, "env_vars": given}


def followed(config: SubmitConfig, jobs: Jobs, name: str) -> dict[str, Any]:
    """Show the job's output until it ends, and return its result line; see `main` for the exit code."""
    lines = [""]

    def show(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
        first, *rest = text.split("\n")
        lines[-1] += first
        lines.extend(rest)

    try:
        ended = jobs.follow(name, show)
    except KeyboardInterrupt:
        at = "" if not config.address else f" --address {jobs.address}"
        if not config.stop_on_interrupt:
            sys.stderr.write(
                f"\n{name} goes on; follow it with `python -m jobs.submit address={jobs.address} "
                f"follow={name}`, stop it with `ray job stop{at} {name}`\n"
            )
            sys.exit(INTERRUPTED)
        logger.info("stopping %s, which saves a checkpoint first", name)
        jobs.stop(name)
        lines[:] = [""]
        ended = jobs.follow(name, lambda text: None)
    return concluded(name, ended, lines)


def concluded(name: str, ended: Ended, lines: Sequence[str]) -> dict[str, Any]:
    """Return the result line of a job that succeeded; end the process as the entrypoint did otherwise."""
    if ended.status == "SUCCEEDED":
        return last_result(list(lines)) or {"job": name}
    if ended.status == "STOPPED":
        sys.stderr.write(f"{name} was stopped; the same command with resume=true goes on\n")
        sys.exit(INTERRUPTED)
    if ended.code is None:
        raise SubmissionError(f"{name} did not start: {' '.join(ended.message.split())}")
    sys.stderr.write(f"{name} ended with exit code {ended.code}\n")
    sys.exit(ended.code)


def run(argv: Sequence[str]) -> NoReturn:
    """Read the options before `--` and the job after it, and run `main`."""
    cut = argv.index("--") if "--" in argv else len(argv)
    job = list(argv[cut + 1 :])
    run_job(lambda config: main(config, job), SubmitConfig, argv[:cut])


if __name__ == "__main__":
    run(sys.argv[1:])

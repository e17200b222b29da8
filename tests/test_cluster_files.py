"""The files that start clusters, each against the schema, the program or the code that reads it."""

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from click.testing import CliRunner
from crd_schema import problems
from jsonschema import Draft7Validator
from packaging.specifiers import SpecifierSet
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import symmetric_run
from ray.serve.schema import ServeDeploySchema

from actors.serving.application import serve_config
from actors.serving.config import ServiceConfig
from cluster.doctor import arguments
from cluster.explain import explain
from cluster.placement import ClusterView, NodeView, plan
from jobs.config import parse_config
from jobs.serve import plain
from jobs.serve_settings import ServeConfig
from jobs.settings import DistillConfig
from jobs.stage import _critic_pool, _evaluator_pool, _trainer_pool

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "cluster" / "files"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
IMAGE = f"registry.example.com/counterpoint:{PROJECT['version']}"
MANIFESTS = ("raycluster", "rayjob", "rayservice")


def manifest(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load((FILES / "kuberay" / f"{name}.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(document)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def gibibytes(text: str) -> float:
    value, unit = re.fullmatch(r"(\d+)([MG]i)", text).groups()
    return int(value) * {"Mi": 2**20, "Gi": 2**30}[unit]


def view_of(document: dict[str, Any]) -> ClusterView:
    """The nodes of a manifest at its largest, as Ray will count their resources."""
    nodes = []
    for group in cluster_of(document)["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {
            "CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0)),
            "memory": 0.7 * gibibytes(limits["memory"]),
        }  # fmt: skip
        names = [f"{group['groupName']}-{i}" for i in range(group["maxReplicas"])]
        nodes += [NodeView(name, has, has, group.get("labels", {}), name) for name in names]
    return ClusterView(tuple(nodes))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_the_published_definitions_allow(name):
    assert problems(manifest(name)) == []


def put(document, path, value):
    *parents, last = path
    for step in parents:
        document = document[step]
    document[last] = value


POD = ("headGroupSpec", "template", "spec")
MUTATIONS = [
    ("raycluster", ("spec", "rayVersoin"), "2.60.0", "spec.rayVersoin: unknown field"),
    ("raycluster", ("spec", "rayVersion"), 2.6, "2.6 is not of type 'string'"),
    ("raycluster", ("spec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
    ("raycluster", ("spec", *POD, "containers", 0, "resource"), {}, "resource: unknown field"),
    ("raycluster", ("spec", *POD, "containers", 0, "resources", "limits", "cpu"), [4], "[4] is not"),
    ("raycluster", ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
    ("raycluster", ("metadata",), {}, "metadata: name or generateName is required"),
    ("raycluster", ("metadata", "lables"), {}, "metadata.lables: unknown field"),
    ("raycluster", ("kind",), "RayClutser", "is none of"),
    ("raycluster", ("apiVersion",), "ray.io/v2", "is none of"),
    ("rayjob", ("spec", "backoffLimit"), "1", "'1' is not of type 'integer'"),
    ("rayjob", ("spec", "shutdownAfterJobFinished"), True, "unknown field"),
    (
        "rayjob",
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas"),
        "2",
        "is not of type 'integer'",
    ),
    ("rayservice", ("spec", "serveConfigV2"), {"applications": []}, "is not of type 'string'"),
    ("rayservice", ("spec", "rayClusterConfig", "authOption"), {}, "unknown field"),
]


@pytest.mark.parametrize(("name", "path", "value", "words"), MUTATIONS)
def test_a_mistake_in_a_manifest_is_found(name, path, value, words):
    broken = copy.deepcopy(manifest(name))
    put(broken, path, value)
    assert any(words in problem for problem in problems(broken)), problems(broken)


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "headGroupSpec"),
        ("spec", "headGroupSpec", "template"),
        ("spec", *POD, "containers"),
    ],
)
def test_a_required_part_that_is_missing_is_found(path):
    broken = copy.deepcopy(manifest("raycluster"))
    parent = broken
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    assert any(f"'{path[-1]}' is a required property" in problem for problem in problems(broken))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_agree_with_the_pinned_versions_and_the_image(name):
    document = manifest(name)
    assert cluster_of(document)["rayVersion"] == PINS["ray"] == ray.__version__
    assert [pod["containers"][0]["image"] for pod in pods(document)] == [IMAGE] * len(pods(document))


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_ask_for_the_token_and_run_without_privileges(name):
    document = manifest(name)
    assert cluster_of(document)["authOptions"] == {"mode": "token"}
    for pod in pods(document):
        container = pod["containers"][0]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == user_of_image()
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert not any("valueFrom" not in each for each in container.get("env", []))


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_pod_sees_the_same_runs_and_the_head_does_no_work(name):
    document = manifest(name)
    assert cluster_of(document)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for pod in pods(document):
        claims = {each["name"]: each.get("persistentVolumeClaim") for each in pod["volumes"]}
        mounts = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) == set(claims)
        assert claims["runs"] == {"claimName": "counterpoint-runs"}
        assert mounts["runs"] == "/mnt/runs"


def entrypoint() -> DistillConfig:
    words = shlex.split(manifest("rayjob")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.distill"]
    # The image copies `configs` to where it works.
    path = Path(words[3]).relative_to(dict(instructions())["WORKDIR"])
    return parse_config(DistillConfig, [str(ROOT / path), *words[4:]])


def test_the_job_fits_the_nodes_that_its_manifest_asks_for():
    config = entrypoint()
    pools = [
        _critic_pool(config.critics, config.critics.actors),
        _evaluator_pool(config.evaluation, config.evaluation.workers),
        _trainer_pool(config.trainer),
    ]
    assert all(pool.count and pool.gpus for pool in pools)
    view = view_of(manifest("rayjob"))
    told = explain(plan(pools), view)
    assert told.fits, str(told)
    assert not explain(plan(pools), ClusterView(view.nodes[:1])).fits, "one node would do"


def test_the_job_reads_and_writes_what_every_node_sees_and_goes_on_after_a_failure():
    config = entrypoint()
    assert config.run.startswith("/mnt/runs/")
    assert config.teacher.startswith("/mnt/runs/")
    assert config.resume
    assert manifest("rayjob")["spec"]["backoffLimit"] >= 1
    assert manifest("rayjob")["spec"]["shutdownAfterJobFinishes"] is True


def test_the_service_is_what_serve_takes_and_what_our_command_writes():
    given = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(given)
    (application,) = given["applications"]
    config = ServiceConfig.model_validate(application["args"])
    written = serve_config(config)
    written["applications"][0]["args"] = application["args"]
    assert given == written
    ours = parse_config(
        ServeConfig, [str(ROOT / "configs/serve/digits.yaml"), "root=/mnt/runs", "host=0.0.0.0"]
    )
    assert config.model_copy(update={"keys": ()}) == plain(ours)


def test_the_service_lets_nobody_in_until_it_is_given_a_key():
    given = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    config = ServiceConfig.model_validate(given["applications"][0]["args"])
    assert [key.sha256 for key in config.keys] == ["0" * 64]


def test_the_service_fits_its_nodes():
    config = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    wanted = sum(
        each["num_replicas"] * each["ray_actor_options"]["num_cpus"]
        for each in config["applications"][0]["deployments"]
    )
    least = cluster_of(manifest("rayservice"))["workerGroupSpecs"][0]
    limits = least["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert wanted <= least["minReplicas"] * float(limits["cpu"])


RAY_SCHEMA = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


def launcher() -> dict[str, Any]:
    return yaml.safe_load((FILES / "ray-up.yaml").read_text())


def test_the_launcher_file_is_what_ray_up_takes():
    Draft7Validator(RAY_SCHEMA).validate(launcher())
    config = launcher()
    assert config["head_node_type"] in config["available_node_types"]
    assert config["docker"]["image"] == IMAGE
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("max_wrokers",), 4),
        (("max_workers",), "4"),
        (("provider",), {"region": "us-east-1"}),
        (("available_node_types", "gpu", "resources", "GPU"), "4"),
        (("available_node_types", "gpu", "lables"), {}),
        (("docker", "imgae"), "x"),
    ],
)
def test_a_mistake_in_the_launcher_file_is_found(path, value):
    broken = launcher()
    put(broken, path, value)
    assert not Draft7Validator(RAY_SCHEMA).is_valid(broken)


def test_the_launcher_starts_ray_with_options_that_it_has_and_a_token():
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        (command,) = (text for text in launcher()[commands] if "ray start" in text)
        assert "RAY_AUTH_MODE=token" in command
        assert "/home/ray/.ray/auth_token" in command
        assert "/home/ray/.ray/auth_token" in launcher()["file_mounts"]
        check_start_options(shlex.split(command.partition("ray start")[2]))
    assert "--dashboard-host=127.0.0.1" in launcher()["head_start_ray_commands"][1]


def check_start_options(words):
    """Parse words as `ray start` does; click ends with an error for an option that it does not have."""
    known = {option for parameter in start.params for option in parameter.opts}
    given = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert given
    assert set(given) <= known, set(given) - known


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continued lines joined."""
    lines = [line for line in (FILES / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def user_of_image() -> int:
    return int([value for name, value in instructions() if name == "USER"][-1])


def test_images_are_built_from_pinned_bases():
    defaults = dict(value.split("=", 1) for name, value in instructions() if name == "ARG" and "=" in value)
    bases = [value.split() for name, value in instructions() if name == "FROM"]
    assert len(bases) == 2
    for base in bases:
        image = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], base[0])
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", image), image
    # The base's distribution brings this Python; what it is must be one that the project supports.
    assert "ubuntu24.04" in defaults["BASE"]
    assert "3.12" in SpecifierSet(PROJECT["requires-python"])


def test_the_image_takes_the_pinned_set_and_torch_first():
    installs = [value for name, value in instructions() if name == "RUN" and "pip install" in value]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    assert installs[0].endswith(" torch")
    assert "python3-venv" in " ".join(value for name, value in instructions() if name == "RUN")


def test_the_image_copies_what_there_is_fetches_nothing_and_keeps_no_secret():
    text = (FILES / "Dockerfile").read_text()
    assert not [value for name, value in instructions() if name == "ADD"]
    assert not re.search(r"(curl|wget)\s+(-\S+\s+)*http", text)
    copied = set()
    for name, value in instructions():
        if name == "COPY" and "--from" not in value:
            *sources, _ = value.split()
            copied |= set(sources)
    assert all((ROOT / source).exists() for source in copied)
    packages = {file.parent.name for file in ROOT.glob("*/*.py")} - {"tests"}
    assert copied >= {"counterpoint", "cluster", "actors", "jobs", "configs", "constraints.txt"}
    assert packages - {"notebooks"} <= copied
    named = " ".join(value for name, value in instructions() if name in ("ENV", "ARG"))
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|KEY)=", named)


def test_the_image_runs_as_somebody_and_its_command_is_the_self_test():
    assert user_of_image() >= 1000
    (command,) = (json.loads(value) for name, value in instructions() if name == "CMD")
    assert command[:3] == ["python", "-m", "cluster.doctor"]
    assert "--yes" in (FILES / "Dockerfile").read_text()


def slurm_run() -> tuple[list[str], list[str]]:
    """The words of `ray symmetric-run` before and after the separator."""
    joined = re.sub(r"\\\n\s*", " ", (FILES / "slurm.sbatch").read_text())
    (line,) = (line for line in joined.splitlines() if "symmetric-run" in line and not line.startswith("#"))
    words = shlex.split(line.partition("symmetric-run")[2])
    return words[: words.index("--")], words[words.index("--") + 1 :]


def test_the_slurm_script_is_bash():
    checked = subprocess.run(["bash", "-n", str(FILES / "slurm.sbatch")], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_slurm_script_uses_options_that_symmetric_run_and_ray_start_have():
    before, after = slurm_run()
    context = symmetric_run.make_context("symmetric-run", [*before, "--", *after], resilient_parsing=True)
    own = {option for parameter in symmetric_run.params for option in parameter.opts}
    assert "--min-nodes" in before
    assert "--address" in before
    passed = [word for word in before if word.startswith("--") and word.partition("=")[0] not in own]
    assert set(passed) <= set(context.params["ray_args_and_entrypoint"])
    check_start_options(passed)
    assert not {"--head", "--node-ip-address", "--port", "--block"} & {
        word.partition("=")[0] for word in passed
    }


def test_symmetric_run_still_wants_its_separator(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ray", "symmetric-run", "--address", "127.0.0.1:1"])
    told = CliRunner().invoke(symmetric_run, ["--address", "127.0.0.1:1"])
    assert told.exit_code != 0
    assert "--" in told.output


def test_the_slurm_script_asks_for_the_token_and_whole_nodes():
    text = (FILES / "slurm.sbatch").read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert "umask 077" in text
    assert re.search(r"^#SBATCH --exclusive$", text, re.M)
    assert "--dashboard-host=127.0.0.1" in text


def test_the_slurm_script_tests_the_cluster_when_it_is_given_nothing_to_run():
    text = (FILES / "slurm.sbatch").read_text()
    words = shlex.split(re.search(r"set -- python -m cluster\.doctor (.*)", text)[1])
    given = arguments([word.replace("$SLURM_JOB_NUM_NODES", "2") for word in words])
    assert given.expect_nodes == 2


STAND_INS = {
    "scontrol": "echo node-a; echo node-b",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "echo 127.0.1.1 fe80::1 10.0.0.7 10.0.0.8",
    "ray": 'while [[ $1 != -- ]]; do echo "$1"; shift; done; shift; [[ ${BROKEN:-} ]] && exit 0; exec "$@"',
}


@pytest.mark.parametrize(
    ("command", "broken", "code"), [("true", "", 0), ("exit 7", "", 7), ("true", "1", 1)]
)
def test_the_slurm_script_ends_with_the_code_of_its_command(tmp_path, command, broken, code):
    """Run with stand-ins for Slurm's programs and for `ray`, which ends with 0 when it could not start."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "BROKEN": broken,
    }  # fmt: skip
    token = '"$RAY_AUTH_TOKEN_PATH"'
    told = f'echo "$RAY_ADDRESS $RAY_AUTH_MODE $(stat -c %a {token}) $(wc -c <{token})"'
    ran = subprocess.run(
        ["bash", str(FILES / "slurm.sbatch"), "bash", "-c", f"{told}; {command}"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr
    if not broken:
        assert "10.0.0.7:6379 token 600 64" in ran.stdout
    else:
        assert "never ran" in ran.stderr
    assert not list(tmp_path.glob(".ray-token-*"))

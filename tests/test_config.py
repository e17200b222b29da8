"""Configuration: YAML, overrides and options become one checked object, and every mistake one clear line."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field, field_validator, model_validator

from counterpoint.section import Section
from jobs.config import choice, dump_config, load_config, parse_config, result_line, run_job
from jobs.config_errors import ConfigError


class Band(Section):
    """One noise band."""

    level: int = 10
    """Timestep of the band."""
    weight: float = 1.0
    """Its share of the loss."""


class Critics(Section):
    """The panel."""

    refresh_rate: float = Field(0.01, ge=0, le=1)
    """Share of heads re-initialised per step."""
    loss: Literal["hinge", "softplus"] = "hinge"
    """Their loss."""
    refresh: Literal["off", "on"] = "on"
    """Whether heads are re-initialised."""
    bands: list[Band] = [Band(level=10), Band(level=250)]
    """Noise bands."""
    weights: dict[str, float] = {}
    """Weights by name."""


class Digits(Section):
    """Embedded images."""

    kind: Literal["digits"] = "digits"
    """Which data."""
    split_seed: int = 0
    """Seed of the split."""


class Folder(Section):
    """Images of one's own."""

    kind: Literal["folder"] = "folder"
    """Which data."""
    uri: str
    """Where they are."""


class Job(Section):
    """Distils."""

    name: str = "run"
    """Name of the run."""
    lr: float = 1e-3
    """Learning rate."""
    steps: int = Field(100, gt=0)
    """Optimizer steps."""
    resume: bool = False
    """Go on from the last checkpoint."""
    classes: list[int] | None = None
    """Classes to sample."""
    limit: int | Literal["all"] = "all"
    """Number of images."""
    share: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """A number or a share."""
    critics: Critics = Critics(refresh_rate=0.02, weights={"a": 1.0})
    """The panel."""
    evaluation: Critics | None = None
    """Another panel."""
    data: Annotated[Digits | Folder, Field(discriminator="kind")] = Digits()
    """The data."""

    @field_validator("name")
    @classmethod
    def _no_spaces(cls, value: str) -> str:
        if " " in value:
            raise ValueError("a name has no spaces")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Job":
        if self.steps == 13:
            raise ValueError("steps 13 does not divide the batch; use 12")
        return self


class Needs(Section):
    """Has a required field."""

    uri: str
    """Where to read from."""
    steps: int = 1
    """How many."""


def test_defaults_alone_are_a_configuration() -> None:
    assert load_config(Job, []) == Job()


def test_file_and_overrides_reach_every_kind_of_field(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("lr: 1e-4\ncritics: {loss: softplus, bands: [{level: 1}, {level: 2}]}\n")
    arguments = (
        "steps=7 critics.refresh_rate=0 critics.bands.1.weight=0.5 critics.weights.edge=2 classes=[1,2]"
    )
    config = load_config(
        Job, [str(file), *arguments.split(), "critics.refresh=off", "evaluation.loss=softplus"]
    )
    assert config.lr == 1e-4
    assert config.steps == 7
    assert config.critics == Critics(
        refresh_rate=0.0,
        loss="softplus",
        refresh="off",
        bands=[Band(level=1), Band(level=2, weight=0.5)],
        weights={"edge": 2.0},
    )
    assert config.evaluation == Critics(loss="softplus")
    assert config.classes == [1, 2]
    assert load_config(Job, ["evaluation.loss=softplus", "evaluation=null"]).evaluation is None


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--resume"], "resume", True),
        (["--resume", "--steps", "4"], "resume", True),
        (["--resume", "steps=4"], "steps", 4),
        (["--resume=false"], "resume", False),
        (["--steps=3"], "steps", 3),
        (["--classes", "0", "3", "5", "lr=1"], "classes", [0, 3, 5]),
        (["--classes", "7"], "classes", [7]),
        (["--classes", "[1, 2]", "--steps", "1"], "classes", [1, 2]),
        (
            ["--critics.loss", "softplus"],
            "critics",
            Critics(refresh_rate=0.02, loss="softplus", weights={"a": 1.0}),
        ),
        (["--lr", "-1e-3"], "lr", -1e-3),
        (["--limit", "all"], "limit", "all"),
        (["limit=12"], "limit", 12),
        (["share=0.5"], "share", 0.5),
        (["name=007"], "name", "007"),
        (["name=true"], "name", "true"),
        (["name=2024-01-01"], "name", "2024-01-01"),
        (["name='1'"], "name", "1"),
        (["name=a=b"], "name", "a=b"),
        (["name=s3://bucket/x"], "name", "s3://bucket/x"),
        (["lr=1e-3"], "lr", 1e-3),
        (["lr=.5"], "lr", 0.5),
        (["data.kind=folder", "data.uri=x"], "data", Folder(uri="x")),
        (["data={kind: folder, uri: y}"], "data", Folder(uri="y")),
        (["critics={}"], "critics", Job().critics),
        (["data.split_seed=3"], "data", Digits(split_seed=3)),
        (["critics.weights.b=2"], "critics", Critics(refresh_rate=0.02, weights={"b": 2.0})),
        (["steps=1", "steps=2"], "steps", 2),
    ],
)
def test_arguments_are_read_as_meant(arguments: list[str], field: str, value: object) -> None:
    assert getattr(parse_config(Job, arguments), field) == value


BAD_ARGUMENTS = [
    ("critics.refresh_rat=0.3", ["critics.refresh_rat", "0.3", "critics.refresh_rate (float, default 0.02)"]),
    ("refresh_rate=0.3", ["unknown key refresh_rate", "0.3", "critics.refresh_rate"]),
    ("critic.loss=hinge", ["unknown key critic.loss", "hinge", "critics.loss"]),
    ("stpes=4", ["unknown key stpes", "4", "steps (int, default 100)"]),
    ("seed.x=4", ["unknown key seed.x = 4"]),
    ("steps.x=4", ["unknown key steps.x = 4", "nearest valid key is steps"]),
    ("data.split_sed=1", ["unknown key data.split_sed = 1", "data.split_seed"]),
    ("data.uri=x", ["unknown key data.uri = x"]),
    ("critics={los: hinge}", ["unknown key critics.los = hinge", "critics.loss"]),
    ("critics.bands=[{levl: 3}]", ["unknown key critics.bands.0.levl = 3", "critics.bands.<n>.level"]),
    ("evaluation.lss=hinge", ["unknown key evaluation.lss = hinge", "evaluation.loss"]),
    ("steps=many", ["invalid steps = many", "valid integer", "steps (int, default 100)"]),
    ("steps=1.5", ["invalid steps = 1.5", "valid integer"]),
    ("steps=0", ["invalid steps = 0", "greater than 0"]),
    ("steps=[1]", ["invalid steps = [1]", "valid integer"]),
    ("steps=", ["invalid steps = null", "valid integer"]),
    ("steps=13", ["steps 13 does not divide the batch; use 12"]),
    ("name={a: 1}x", ["name={a: 1}x is not valid YAML"]),
    ("name=has space", ["invalid name = has space", "a name has no spaces"]),
    ("name=null", ["invalid name = null", "valid string"]),
    ("critics.refresh_rate=2", ["invalid critics.refresh_rate = 2", "less than or equal to 1"]),
    ("critics.refresh_rate=abc", ["invalid critics.refresh_rate = abc", "valid number"]),
    ("critics.loss=hing", ["invalid critics.loss = hing", "'hinge' or 'softplus'"]),
    ("critics=5", ["invalid critics = 5", "Critics"]),
    ("critics.bands.0.level=1", ["critics.bands has its default; set the whole of critics.bands"]),
    ("critics.weights={edge: big}", ["invalid critics.weights.edge = big", "valid number"]),
    ("classes=[1, x]", ["invalid classes.1 = x", "valid integer"]),
    ("limit=some", ["invalid limit = some", "valid integer", "'all'"]),
    ("share=1.5", ["invalid share = 1.5", "valid integer", "less than 1"]),
    ("data.kind=fodler", ["invalid data.kind = fodler", "'digits', 'folder'"]),
    ("data.kind=folder", ["required key data.uri (str, required) is missing"]),
    ("data={uri: x}", ["unknown key data.uri = x"]),
    ("resume=perhaps", ["invalid resume = perhaps", "valid boolean"]),
    ("lr=[", ["lr=[ is not valid YAML"]),
    ("lr={a: 1, a: 2}", ["key 'a' is there twice"]),
    ("--lr", ["--lr needs a value", "lr (float, default 0.001)"]),
    ("--resum", ["unknown key resum = true", "resume (bool, default false)"]),
    ("--step=2", ["unknown key step = 2", "steps"]),
    ("no/such.yaml", ["no/such.yaml", "No such file"]),
    ("=3", ["=3"]),
]


@pytest.mark.parametrize(
    ("argument", "words"), BAD_ARGUMENTS, ids=[argument for argument, _ in BAD_ARGUMENTS]
)
def test_a_mistake_in_an_argument_is_one_line_and_exit_code_two(
    argument: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(Job, [argument])
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: ")
    for word in words:
        assert word in output.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("critics:\n  refresh_rat: 0.3\n", ["unknown key critics.refresh_rat = 0.3", "critics.refresh_rate"]),
        ("steps: many\n", ["invalid steps = many"]),
        ("critics:\n", ["invalid critics = null"]),
        ("stesp: 1\nlr: x\n", ["unknown key stesp", "(and 1 more)"]),
        ("[1, 2]\n", ["must hold keys and values, not [1, 2]"]),
        ("just text\n", ["must hold keys and values, not just text"]),
        ("a: [1\nb: 2\n", ["is not valid YAML", "(line 2)"]),
        ("steps: 1\nsteps: 2\n", ["key 'steps' is there twice (line 2)"]),
        ("? [a]\n: 1\n", ["is not valid YAML"]),
        ("1: 2\n", ["keys should be strings"]),
        (
            "!!python/object/apply:os.system [ls]\n",
            ["is not valid YAML", "could not determine a constructor"],
        ),
        ("extends: nowhere.yaml\n", ["nowhere.yaml cannot be read: No such file"]),
        ("extends: job.yaml\n", ["extends itself"]),
        ("extends: [a.yaml]\n", ["extends = [a.yaml] in"]),
        ("\x00", ["is not valid YAML"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, content: str, words: list[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        parse_config(Job, [str(file)])
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_files_that_are_no_text_or_two_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_config(Job, [str(tmp_path / "a.yaml")])
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        parse_config(Job, [str(tmp_path)])
    with pytest.raises(
        ConfigError, match=r"'b.yaml' is neither key=value nor the configuration file \(a.yaml\)"
    ):
        parse_config(Job, ["a.yaml", "b.yaml"])


def test_an_override_says_why_a_list_or_a_value_cannot_take_it(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("critics: {bands: [{level: 1}]}\nevaluation: off\n")
    with pytest.raises(ConfigError, match=r"critics\.bands is a list of 1, counted from 0, and has no 3"):
        parse_config(Job, [str(file), "critics.bands.3.level=2"])
    with pytest.raises(
        ConfigError, match=r"evaluation is off and has no key loss; set the whole of evaluation"
    ):
        parse_config(Job, [str(file), "evaluation.loss=hinge"])


def test_a_required_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"required key uri \(str, required\) is missing; set uri="):
        parse_config(Needs, [])


def test_extends_lays_one_file_over_another(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text(
        "steps: 5\ncritics: {loss: softplus, refresh_rate: 0.5}\nclasses: [1, 2]\n"
    )
    (tmp_path / "deep/middle.yaml").write_text("extends: ../base.yaml\nlr: 0.1\n")
    (tmp_path / "top.yaml").write_text(
        "extends: deep/middle.yaml\ncritics: {refresh_rate: 0.25}\nclasses: [3]\n"
    )
    config = parse_config(Job, [str(tmp_path / "top.yaml"), "steps=6"])
    assert (config.steps, config.lr, config.classes) == (6, 0.1, [3])
    assert config.critics == Critics(loss="softplus", refresh_rate=0.25, weights={"a": 1.0})


def test_a_section_in_a_list_may_extend_a_file(tmp_path: Path) -> None:
    (tmp_path / "band.yaml").write_text("level: 750\nweight: 2.0\n")
    (tmp_path / "top.yaml").write_text("critics: {bands: [{level: 5}, {extends: band.yaml, weight: 3.0}]}\n")
    config = parse_config(Job, [str(tmp_path / "top.yaml")])
    assert config.critics.bands == [Band(level=5), Band(level=750, weight=3.0)]


OPTIONS = {"diffusion": 1, "policy": 2}


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [("", [], 1), ("learner: policy\n", ["seed=1"], 2), ("learner: policy\n", ["learner=diffusion"], 1)],
)
def test_a_key_chooses_the_configuration(
    tmp_path: Path, content: str, arguments: list[str], expected: int
) -> None:
    (tmp_path / "job.yaml").write_text(content)
    assert choice([str(tmp_path / "job.yaml"), *arguments], "learner", OPTIONS) == expected
    assert choice(arguments, "learner", OPTIONS) == 1


def test_an_unknown_choice_names_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        choice(["learner=dance"], "learner", OPTIONS)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: learner = dance; give one of diffusion, policy\n"


@pytest.mark.parametrize(
    "name", ["1e-3", "off", "007", "null", "2024-01-01", "~", "0x1F", "caf\u00e9", ".inf", "1_0"]
)
def test_a_dumped_configuration_comes_back_equal(tmp_path: Path, name: str) -> None:
    config = Job(name=name, lr=1e-7, evaluation=Critics(weights={"on": math.inf}), data=Folder(uri="x"))
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(Job, [str(file)]) == config
    assert load_config(Job, [str(file)]).model_dump() == config.model_dump()


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_config(Job, ["steps=0", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert "critics.refresh_rate: float = 0.02\n    Share of heads re-initialised per step.\n" in shown
    assert "critics.loss: hinge | softplus = hinge\n    Their loss.\n" in shown
    assert "critics.bands.<n>.weight: float = 1.0" in shown
    assert "classes: list[int] | null = null" in shown
    assert "data.uri: str = required" in shown
    assert "data.kind: digits | folder = digits" in shown
    assert "critics.bands: list[Band] = [{level: 10, weight: 1.0}, {level: 250, weight: 1.0}]" in shown


def test_the_result_line_is_strict_json(capsys: pytest.CaptureFixture[str]) -> None:
    result_line(
        {"fd": torch.tensor(1.5), "gap": math.nan, "n": np.int64(3), "rows": [np.float32(0.5), math.inf]}
    )
    printed = capsys.readouterr().out
    assert printed.endswith("}\n")
    assert printed.count("\n") == 1
    assert json.loads(printed, parse_constant=pytest.fail) == {
        "fd": 1.5,
        "gap": None,
        "n": 3,
        "rows": [0.5, None],
    }


def chatty(config: Job) -> dict[str, Any]:
    print("progress")  # noqa: T201
    logging.getLogger("chatty").warning("careful")
    return {"steps": config.steps}


def refused(_: Job) -> dict[str, Any]:
    raise ValueError("data.uri 'x' holds no images;\nset data.uri")


def interrupted(_: Job) -> dict[str, Any]:
    raise KeyboardInterrupt


def broken(_: Job) -> dict[str, Any]:
    raise RuntimeError("our own mistake")


def test_a_job_keeps_standard_output_for_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(chatty, Job, ["steps=3"])
    output = capsys.readouterr()
    assert ended.value.code == 0
    assert output.out == '{"steps": 3}\n'
    assert "progress" in output.err


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (refused, 2, "error: data.uri 'x' holds no images; set data.uri\n"),
        (interrupted, 130, "interrupted\n"),
    ],
)
def test_a_job_that_ends_early_says_so_by_its_exit_code(
    main: Any, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(main, Job, [])
    assert ended.value.code == code
    assert capsys.readouterr() == ("", said)


def test_our_own_mistakes_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(broken, Job, [])
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.count("Traceback (most recent call last)") == 1
    assert "in broken" in told
    assert "our own mistake" in told


def test_a_process_exits_with_code_two_and_one_line() -> None:
    script = """
from counterpoint.section import Section
from jobs.config import run_job

class Job(Section):
    steps: int = 1

run_job(lambda config: {"steps": config.steps}, Job)
"""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=240
        )

    good = run("steps=2")
    assert (good.returncode, good.stdout, good.stderr) == (0, '{"steps": 2}\n', "")
    bad = run("step=2")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: unknown key step = 2; the nearest valid key is steps (int, default 1)\n"

"""The planner's verdicts, remedies, placements and mistakes, on networks that are small or only on paper."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from counterpoint.footprint.sharding import CUDA_CONTEXT
from jobs.config import parse_config
from jobs.config_errors import ConfigError
from jobs.plan import main
from jobs.plan_networks import network_of
from jobs.plan_settings import (
    DistillPlan,
    MachinesConfig,
    PolicyPlan,
    TextPlan,
    TrainPlan,
    parse_bytes,
    plan_of,
    with_teacher,
)

SMALL = {
    "block_out_channels": [16, 16], "transformer_layers_per_block": [1, 1], "attention_head_dim": [2, 2],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 1,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 8, "sample_size": 16,
    "in_channels": 4, "out_channels": 4, "cross_attention_dim": 24, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64, "use_linear_projection": True,
}  # fmt: skip
TEACHER = "teacher_config=configs/digits/teacher.yaml"


def planned(model: type[MachinesConfig], *argv: str, **fields: Any) -> dict[str, Any]:
    config = parse_config(model, argv)
    return main(config.model_copy(update=fields))


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("1.5MiB", 1536 * 1024), ("7B", 7)]
)
def test_sizes_of_memory_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "80 gib", "0GiB", "-1GB", ""])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="80GiB or 24GB"):
        parse_config(DistillPlan, [f"gpu_memory={text!r}"])


def test_the_job_is_told_from_its_file() -> None:
    assert plan_of(["configs/digits/distill.yaml"]) is DistillPlan
    assert plan_of(["configs/digits/teacher.yaml", "--job", "train"]) is TrainPlan
    assert plan_of(["configs/sdxl/plan.yaml"]) is TextPlan
    assert plan_of(["configs/vla/policy.yaml"]) is PolicyPlan


def test_a_distillation_is_planned_before_its_teacher_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(DistillPlan, "configs/digits/distill.yaml", TEACHER, "gpus=2", "gpu_memory=16GiB")
    assert result["fits"]
    assert result["heads"] == 4 * 30
    assert set(result["roles"]) == {"trainer", "trainer making pairs", "critics", "evaluator"}
    trainer = result["roles"]["trainer"]
    assert trainer["parameters"] == 4 * result["trained_parameters"]
    assert trainer["device"] > CUDA_CONTEXT
    assert result["placement"] == {"machine-0": {"trainer": 1, "evaluator": 1, "critics": 4}}
    assert result["bytes_per_step"]["between_machines"] == 0
    said = capsys.readouterr().err
    assert "warmup.batch_size: 128 = 1 workers x 1 micro-batches x 128 samples" in said
    assert "trainer: FITS" in said


def test_machines_of_one_gpu_send_what_actors_send() -> None:
    argv = ["configs/digits/distill.yaml", TEACHER, "gpus_per_node=1", "gpus=3", "trainer.workers=2"]
    result = planned(DistillPlan, *argv, "evaluation.workers=0")
    sent = result["bytes_per_step"]
    assert sent["each_trainer_to_trainers"] == 4 * result["trained_parameters"]
    # Both trainers talk to critics on the third machine.
    panel = sent["to_critics"] + sent["to_trainers"]
    assert sent["between_machines"] == 2 * sent["each_trainer_to_trainers"] + panel
    rounded = planned(DistillPlan, *argv, "evaluation.workers=0", "critics.wire_dtype=bfloat16")
    assert rounded["bytes_per_step"]["to_critics"] == pytest.approx(sent["to_critics"] / 2, rel=0.02)


def test_too_few_gpus_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(DistillPlan, "configs/digits/distill.yaml", TEACHER, "gpus=1", "trainer.workers=4")
    assert not result["fits"]
    assert result["placement"] == {}
    assert "trainer.workers" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="126 or 129"):
        parse_config(DistillPlan, ["trainer.workers=3", "critics.levels_per_step=1"])


def test_a_trainer_that_does_not_fit_is_told_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "gpus=1",
        "warmup.batch_size=256",
        "adversarial.steps=0",
        "adversarial.heads_alone=0",
        "pairs.chunk=4",
    ]
    whole = planned(TextPlan, *argv, unet_shape=SMALL)
    each = whole["roles"]["trainer"]
    limit = CUDA_CONTEXT + (each["device"] - CUDA_CONTEXT) * 5 // 6
    result = planned(TextPlan, *argv, f"gpu_memory={limit}B", unet_shape=SMALL)
    assert "trainer" in result["does_not_fit"]
    first, *_ = result["remedies"]
    assert first["setting"] == "trainer.strategy.activation_checkpointing=true"
    assert result["remedies"][-1]["device"] <= limit
    assert "trainer: DOES NOT FIT" in capsys.readouterr().err


def test_lora_leaves_fewer_weights_to_learn() -> None:
    argv = [
        "gpus=1",
        "warmup.batch_size=4",
        "adversarial.steps=0",
        "adversarial.heads_alone=0",
        "pairs.chunk=4",
    ]
    whole, adapted = (
        planned(TextPlan, *argv, unet_shape=SMALL),
        planned(TextPlan, *argv, "lora.rank=2", unet_shape=SMALL),
    )
    assert adapted["trained_parameters"] < whole["trained_parameters"] / 10
    assert adapted["roles"]["trainer"]["optimizer"] < whole["roles"]["trainer"]["optimizer"] / 10


@pytest.mark.parametrize(
    ("model", "remedy"),
    [(DistillPlan, "teacher_config="), (TextPlan, "unet_shape, as configs/sdxl/plan")],
)
def test_a_teacher_that_nobody_knows_is_refused(
    model: type[MachinesConfig], remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^teacher={tmp_path}.*{remedy}"):
        planned(model, f"teacher={tmp_path}")


@pytest.mark.parametrize(
    ("name", "maker"), [("digits/distill", "digits/teacher"), ("sdxl/tiny", "sdxl/tiny_encode")]
)
def test_what_makes_the_teacher_is_found_beside_the_file(name: str, maker: str) -> None:
    argv = [f"configs/{name}.yaml", "--gpus", "1"]
    assert with_teacher(plan_of(argv), argv) == [*argv, f"teacher_config=configs/{maker}.yaml"]
    elsewhere = [*argv, "teacher=runs/elsewhere"]
    assert with_teacher(plan_of(argv), elsewhere) == elsewhere


def test_the_shape_of_a_text_teacher_is_that_which_its_encoding_builds() -> None:
    maker = "teacher_config=configs/sdxl/tiny_encode.yaml"
    config = parse_config(TextPlan, ["configs/sdxl/tiny.yaml", maker])
    assert network_of(config).shape == (4, 8, 8)
    named = parse_config(TextPlan, ["teacher=stabilityai/stable-diffusion-xl-base-1.0"])
    assert network_of(named).shape == (4, 128, 128)


def test_a_lone_trainer_on_one_gpu_hosts_its_critics_and_shares_with_others() -> None:
    argv = ["configs/digits/distill.yaml", TEACHER, "gpus=1", "adversarial.batch_size=16"]
    apart = planned(DistillPlan, *argv, "warmup.batch_size=16")
    inside = planned(
        DistillPlan, *argv, "warmup.batch_size=16", "critics.actors=0", "adversarial.staleness=1"
    )
    assert apart["placement"] == {"machine-0": {"trainer": 1, "critics": 4, "evaluator": 1}}
    assert apart["gpus_each"]["trainer"] < 1
    assert inside["placement"] == {"machine-0": {"trainer": 1, "evaluator": 1}}
    alone, host, both = apart["roles"]["trainer"], apart["roles"]["critics"], inside["roles"]["trainer"]
    # All four groups are in the trainer, where a host had one of them.
    assert both["optimizer"] == alone["optimizer"] + 4 * host["optimizer"]
    assert both["fixed"] == alone["fixed"] + 4 * host["fixed"]
    assert both["context"] == alone["context"]
    # A step that is asked ahead keeps 16 samples, real images and gradients.
    shape = network_of(parse_config(DistillPlan, argv)).shape
    assert both["exchange"] == 16 * 3 * 4 * math.prod(shape)


@pytest.mark.slow  # test_submit reads the last line of a job
def test_the_last_line_is_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.plan", "configs/digits/teacher.yaml", "--job", "train", "--gpus", "0"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1])["roles"]["trainer"]["host"] > 0

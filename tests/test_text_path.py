"""Text-to-image from end to end: prompts are encoded, a student is distilled, diffusers loads it."""

import functools
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from tiny_text import SHAPE

from actors.prompted import PromptsRecipe, load_prompted_unet
from cluster.checkpoints import checkpoint_steps, latest_checkpoint
from cluster.sealing import verify
from cluster.storage import RunStore
from counterpoint.diffusion import build_noise_scheduler
from counterpoint.prompts import PromptTable
from counterpoint.seeds import generator
from counterpoint.student import student_x0
from jobs import distill_text, encode
from jobs.encode import EncodeConfig
from jobs.text_settings import DistillTextConfig

TEXTS = [
    f"{colour} {shape}" for colour in ("red", "green", "blue", "grey") for shape in ("box", "disc", "bar")
]
BUILD = SHAPE.model_copy(update={"noise": SHAPE.noise.model_copy(update={"prediction_type": "v_prediction"})})


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Parquet file of twelve prompts, one blank, and images of several shapes."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.parquet"
    stream = np.random.default_rng(0)
    images = []
    for i in range(13):
        buffer = io.BytesIO()
        Image.fromarray(stream.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue()})
    texts = [*TEXTS[:5], " ", *TEXTS[5:]]
    pq.write_table(pa.table({"text": texts, "image": images}), path, row_group_size=4)
    return path


def encode_config(run: Path, source: Path, **options: Any) -> EncodeConfig:
    """Encoding in this process with a small model that is built."""
    base: dict[str, Any] = {
        "run": str(run), "model": {"build": BUILD.model_dump()}, "shard_rows": 5,
        "group_rows": 2, "batch_size": 3,
        "prompts": {"uri": str(source), "column": "text", "image_column": "image"}, "dtype": "float32",
        "workers": {"count": 0},
    }  # fmt: skip
    return EncodeConfig.model_validate(base | options)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, prompt_file: Path) -> str:
    """The URI of a finished run of jobs.encode."""
    run = tmp_path_factory.mktemp("encoded") / "run"
    encode.main(encode_config(run, prompt_file))
    return str(run)


def distill_config(run: Path, encoded: str, **options: Any) -> DistillTextConfig:
    """A student of a few steps through all three stages, trained in this process."""
    base: dict[str, Any] = {
        "run": str(run), "teacher": encoded, "prompts": encoded,
        "pairs": {"count": 16, "chunk": 8, "steps": 4},
        "student": {"refinement": []}, "warmup": {"steps": 4, "batch_size": 8},
        "adversarial": {"heads_alone": 1, "steps": 3, "batch_size": 4, "real": "teacher"},
        "critics": {
            "actors": 0, "levels_per_step": 4, "heads_per_slot": 1, "refresh_rate": 0.01, "width": 4,
            "groups": 2, "reduction": "mean",
        },
        "held_out": {"share": 0.25, "samples": 4, "batch_size": 2}, "pictures": 2,
        "trainer": {"workers": 0, "threads": 1, "checkpoint_every": 5},
    }  # fmt: skip
    return DistillTextConfig.model_validate(base | options)


def pipeline_of(run: Path | str) -> StableDiffusionXLPipeline:
    """What diffusers itself loads from a run."""
    pipe = StableDiffusionXLPipeline.from_pretrained(f"{run}/pipeline", low_cpu_mem_usage=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_table_holds_what_diffusers_encodes(encoded: str, prompt_file: Path) -> None:
    pipe, rows = pipeline_of(encoded), PromptTable(f"{encoded}/prompts")
    assert len(rows) == 12
    assert rows.prompts(range(12)) == TEXTS
    embeds, pooled = rows.take(torch.arange(13), torch.device("cpu"), torch.float32)
    assert pooled is not None
    for row in (0, 5, 11):
        wanted = pipe.encode_prompt([TEXTS[row]])
        torch.testing.assert_close(embeds[row : row + 1], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled[row : row + 1], wanted[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(embeds[12:], pipe.encode_prompt([TEXTS[0]])[1])
    content = (
        pq.read_table(prompt_file).column("image").to_pylist()[6]["bytes"]
    )  # Row 5: a blank one came before.
    image = Image.open(io.BytesIO(content)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    cut = image.resize((16, 16), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(rows.latents(torch.tensor([5])), latent, rtol=1e-4, atol=1e-4)
    assert rows.layout.time_ids == (16, 16, 0, 0, 16, 16)


def test_ray_data_encodes_the_same_and_nothing_twice(
    encoded: str, prompt_file: Path, tmp_path: Path, ray_cluster: object
) -> None:
    run = tmp_path / "run"
    workers = {"count": 2, "cpus_per_worker": 0.5}
    first = encode.main(encode_config(run, prompt_file, workers=workers))
    assert first["encoded_now"] == 3
    alone = PromptTable(f"{encoded}/prompts").layout
    assert PromptTable(f"{run}/prompts").layout.fingerprint() == alone.fingerprint()
    facts = json.loads((run / "run.json").read_text())
    assert facts["address"] is not None
    with pytest.raises(ValueError, match="resume=true"):
        encode.main(encode_config(run, prompt_file, workers=workers))
    again = encode.main(encode_config(run, prompt_file, workers=workers, resume=True))
    assert (again["encoded_now"], again["fingerprint"]) == (0, first["fingerprint"])
    for name in ("table.json", "part-00001.json"):
        (run / "prompts" / name).unlink()
    # What is missing may be made anywhere: here without Ray.
    part = encode.main(encode_config(run, prompt_file, resume=True))
    assert (part["encoded_now"], part["fingerprint"]) == (1, first["fingerprint"])


def test_mistakes_in_prompts_and_models_are_named(tmp_path: Path, encoded: str, prompt_file: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            encode.main(encode_config(tmp_path / "run", prompt_file, **options))

    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    refused("holds 0 prompts", prompts={"uri": str(empty)})
    refused("cannot be read", prompts={"uri": str(tmp_path / "none.txt")})
    refused("not among the columns text, image", prompts={"uri": str(prompt_file)})
    refused("need prompts in a .parquet", prompts={"uri": str(empty), "image_column": "image"})
    refused("no model_index.json", model={"pretrained": str(tmp_path)})
    broken = tmp_path / "broken"
    shutil.copytree(f"{encoded}/pipeline", broken)
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    refused("has no text_encoder_2", model={"pretrained": str(broken)})
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("a box\na box that is much longer than eight tokens\na bar\n")
    made = encode.main(encode_config(tmp_path / "run", lines, prompts={"uri": str(lines)}))
    assert (made["prompts"], made["truncated"], made["images"]) == (3, 1, False)
    assert "1 of 3 prompts are longer" in caplog.text


def one_step(pipe: StableDiffusionXLPipeline, prompt: str, noise: torch.Tensor) -> torch.Tensor:
    """What diffusers makes in one step."""
    made = pipe([prompt], num_inference_steps=1, guidance_scale=0.0, latents=noise, output_type="latent")
    return made.images


def test_a_student_distilled_through_ray_is_one_that_diffusers_runs(
    encoded: str, tmp_path: Path, ray_cluster: object
) -> None:
    run = tmp_path / "run"
    options: dict[str, Any] = {
        "trainer": {"workers": 1, "threads": 1, "checkpoint_every": 5, "cpus_per_worker": 0.5},
        "adversarial": {"heads_alone": 1, "steps": 3, "batch_size": 4, "real": "data"},
        "patch_time_ids": "patch",
        "student": {"refinement": [0.5]},
        "steps": [1, 2],
    }
    config = distill_config(run, encoded, **options)
    critics = config.critics.model_copy(update={"actors": 1})
    headline = distill_text.main(config.model_copy(update={"critics": critics}))
    assert headline["student_1_error"] != headline["student_1_error_before"]
    # Prompts reach teacher and student: another one gives another picture.
    assert headline["prompt_effect"] > 0
    assert headline["other_prompt_error"] != headline["student_1_error"]
    verify(RunStore(str(run)), "pipeline")
    pipe = pipeline_of(run)
    noise = torch.randn(1, 4, 8, 8, generator=generator(0, "noise"))
    student = load_prompted_unet(str(run), PromptsRecipe(encoded)).eval()
    schedule = build_noise_scheduler(BUILD.noise)
    with torch.no_grad():
        expected = student_x0(student, noise, torch.tensor([999]), torch.tensor([3]), schedule, 500)
    torch.testing.assert_close(one_step(pipe, TEXTS[3], noise), expected, rtol=1e-4, atol=1e-4)
    checkpoint = latest_checkpoint(RunStore(str(run)))
    assert checkpoint is not None
    saved, weights = pipe.unet.state_dict(), checkpoint.tensors("weights")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights.items())
    assert (run / "grids" / "teacher-and-student.png").exists()
    assert (run / "report.html").exists()


SAVING = {"precision": "bf16", "activation_checkpointing": True}
KINDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "adapters": {
        "lora": {"rank": 2},
        "trainer": {"workers": 0, "threads": 1, "checkpoint_every": 5, "strategy": SAVING},
    },
}


@pytest.fixture(scope="module")
def distilled(encoded: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Distils in this process, each kind once."""

    @functools.cache
    def make(kind: str) -> Path:
        run = tmp_path_factory.mktemp("student") / "run"
        distill_text.main(distill_config(run, encoded, **KINDS[kind]))
        return run

    return make


@pytest.mark.parametrize("kind", [pytest.param("whole", marks=pytest.mark.slow), "adapters"])
def test_a_resumed_run_is_the_unbroken_one(
    encoded: str, distilled: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    whole = RunStore(str(distilled(kind)))
    run = tmp_path / "run"
    shutil.copytree(distilled(kind), run)
    store = RunStore(str(run))
    before, last = checkpoint_steps(store)[-2:]
    assert (before, last) == (5, 8)
    for name in (f"checkpoints/step-{last:08d}", "results.json", "pipeline", "lora"):
        store.delete(name)
    distill_text.main(distill_config(run, encoded, resume=True, **KINDS[kind]))
    wanted, again = latest_checkpoint(whole), latest_checkpoint(store)
    assert wanted is not None
    assert again is not None
    assert (again.step, again.files.keys()) == (8, wanted.files.keys())
    for name in wanted.files:
        tensors, found = wanted.tensors(name), again.tensors(name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    headlines = [json.loads(one.read_text("results.json"))["headline"] for one in (whole, store)]
    assert headlines[0] == headlines[1]


def test_adapters_are_saved_merged_and_by_themselves(encoded: str, distilled: Callable[[str], Path]) -> None:
    run = distilled("adapters")
    checkpoint = latest_checkpoint(RunStore(str(run)))
    assert checkpoint is not None
    assert all("lora_" in name for name in checkpoint.tensors("weights"))
    noise = torch.randn(1, 4, 8, 8, generator=generator(0, "noise"))
    student, teacher = pipeline_of(run), pipeline_of(encoded)
    teacher.scheduler = student.scheduler
    bare = one_step(teacher, TEXTS[0], noise)
    teacher.load_lora_weights(str(run / "lora"))
    found = one_step(teacher, TEXTS[0], noise)
    torch.testing.assert_close(found, one_step(student, TEXTS[0], noise), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, bare)


def test_what_does_not_fit_together_is_refused(encoded: str, tmp_path: Path) -> None:
    def refused(match: str, prompts: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            distill_text.main(distill_config(tmp_path / "run", encoded, prompts=prompts, **options))

    refused("jobs.encode", str(tmp_path))
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(TEXTS))
    texts = tmp_path / "texts"
    encode.main(encode_config(texts, lines, prompts={"uri": str(lines)}))
    refused("have no images", str(texts), adversarial={"real": "data"})
    other = BUILD.model_copy(update={"text_widths": (8, 8)})
    encode.main(encode_config(tmp_path / "other", lines, prompts={"uri": str(lines)}, model={"build": other}))
    refused("cross_attention_dim=24", str(tmp_path / "other"))
    assert not (tmp_path / "run").exists()

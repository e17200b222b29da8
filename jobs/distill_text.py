"""Distil a text-to-image model into one step: `python -m jobs.distill_text configs/sdxl/tiny.yaml`.

Prompts come encoded from a run of jobs.encode, so that no process of the training holds a text encoder; the
VAE is loaded once, at the end and in the driver, to save the student as a whole pipeline and to draw.
"""

import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from actors.prompted import PromptsRecipe, load_prompted_unet, model_part, open_table, prompted_config
from actors.prompted_trainers import PromptedStudentRecipe
from actors.recipe import PIPELINE, PanelRecipe, build_layout
from actors.worker import LoopSpec
from cluster.checkpoints import latest_checkpoint
from cluster.sealing import save_sealed
from cluster.storage import RunStore, save_image
from counterpoint.alarms import Watcher
from counterpoint.critics.pool import Pool
from counterpoint.data import DataConfig
from counterpoint.diffusion import LatentNoiseConfig, build_noise_scheduler
from counterpoint.grids import image_grid
from counterpoint.guidance import classifier_free
from counterpoint.held_out import Question, answer, other_prompts, pose, relative_error
from counterpoint.lora import merged, save_lora
from counterpoint.one_step import noise_of, one_step_scheduler
from counterpoint.optimization import load_weights
from counterpoint.prompted import PromptedUNet, check_conditioning, plain_unet
from counterpoint.prompts import held_out
from counterpoint.sampling import build_sampler
from counterpoint.scheduler import TimestepShiftScheduler
from jobs.config import run_job
from jobs.distill import describe_pool
from jobs.launch import launch, stopped
from jobs.report import write_report
from jobs.runs import final_weights, open_run, write_results
from jobs.scoring import timed
from jobs.settings import EvaluatorsConfig
from jobs.stage import Cast, cast, check_digests
from jobs.text_settings import DistillTextConfig

LORA = "lora"
CHAIN = "chain"
"""Folder of the scheduler for 2 to 4 steps, which needs this package; the pipeline's own needs none."""


@dataclass(frozen=True)
class Work:
    """All that stands around a text-to-image distillation."""

    config: DistillTextConfig
    store: RunStore
    noise: LatentNoiseConfig
    panel: PanelRecipe

    @property
    def prompts(self) -> PromptsRecipe:
        """What networks are prompted with."""
        assert self.panel.prompts is not None
        return self.panel.prompts

    def chain(self) -> TimestepShiftScheduler:
        """Return a new sampler of the student for 1 to 4 steps; latents are not clipped."""
        shift = self.config.student.timestep_shift
        return TimestepShiftScheduler(
            **self.noise.diffusion_options(), timestep_shift=shift, clip_sample=False
        )


def main(config: DistillTextConfig) -> dict[str, Any]:
    """Distil, save the student, measure it under held-out prompts, and return the headline figures."""
    work = prepare(config)
    pool = build_layout(work.panel)
    seconds: dict[str, float] = {}
    panel = work.panel if config.adversarial.uses_panel else None

    def stage() -> AbstractContextManager[Cast]:
        nobody = EvaluatorsConfig(workers=0, every=0)
        return cast(panel, config.critics, None, nobody, config.trainer, config.run)

    heads = pool.size if panel else 0
    with timed(seconds, "distill"), launch("student", config.trainer, stage, heads) as run:
        result = run(lambda made: loop_spec(work, made))
    if not result.finished:
        return stopped(config.run, result)
    with timed(seconds, "measure"):
        figures = finish(work)
    return conclude(work, figures, pool if panel else None, seconds)


def prepare(config: DistillTextConfig) -> Work:
    """Check that teacher, prompts and panel fit together, and open the run."""
    table = open_table(config.prompts)
    held_out(len(table), config.held_out.share, config.seed)
    check_conditioning(prompted_config(config.teacher), table)
    if config.adversarial.real == "data" and config.adversarial.uses_panel and table.layout.latent is None:
        raise ValueError(
            f"adversarial.real=data but the prompts at {config.prompts} have no images: encode them with "
            "prompts.image_column, or set adversarial.real=teacher"
        )
    with model_part(config.teacher) as (where, _):
        noise = noise_of(dict(DDPMScheduler.load_config(where, subfolder="scheduler")))
    prompts = PromptsRecipe(config.prompts, config.patch_time_ids, config.encoder_dtype)
    steps = config.adversarial.panel_steps
    panel = PanelRecipe(config.teacher, config.critics.plain(), noise, config.seed, prompts, steps)
    store = open_run(config.run, config, config.resume, in_process=config.trainer.workers == 0)
    return Work(config, store, noise, panel)


def loop_spec(work: Work, made: Cast) -> LoopSpec:
    """Return what the trainer's workers run, with the cast that it talks to."""
    config = work.config
    if made.hosts and latest_checkpoint(work.store) is None:
        check_digests(made.hosts, work.panel)
    recipe = PromptedStudentRecipe(
        work.panel, made.hosts, DataConfig(), config.pairs, config.student, config.warmup, config.adversarial,
        config.seed, config.start, config.trainer.accumulate, config.critics.patience,
        lora=config.lora, held_out_share=config.held_out.share,
    )  # fmt: skip
    return LoopSpec(
        config.run, recipe, config.trainer.checkpoint_every, config.trainer.keep_checkpoints,
        watch=lambda: Watcher(config.alarms),
    )  # fmt: skip


def finish(work: Work) -> dict[str, Any]:
    """Measure the student before and after, save it, and draw it beside the teacher."""
    config, store = work.config, work.store
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_prompted_unet(config.teacher, work.prompts).eval().to(device)
    question = _question(work, teacher)
    wanted = _teacher_answers(work, teacher, question)
    start = (
        teacher if config.start is None else load_prompted_unet(config.start, work.prompts).eval().to(device)
    )
    before = {n: relative_error(_student(work, start, question, n), wanted) for n in config.steps}
    others = other_prompts(question)
    figures: dict[str, Any] = {}
    if others is not None:
        # How much prompts matter to the teacher: its own samples from the same noise under other prompts.
        figures["prompt_effect"] = relative_error(_teacher_answers(work, teacher, others), wanted)
    del teacher
    student = _trained(work, start.cpu()).eval()
    save_student(work, student)
    student.to(device)
    found = {n: _student(work, student, question, n) for n in config.steps}
    for n in config.steps:
        figures[f"student_{n}_error_before"] = before[n]
        figures[f"student_{n}_error"] = relative_error(found[n], wanted)
    if others is not None:
        confused = _student(work, student, others, min(config.steps))
        figures["other_prompt_error"] = relative_error(confused, wanted)
    if config.pictures:
        shown = [wanted[: config.pictures], *(found[n][: config.pictures] for n in config.steps)]
        save_image(store, "grids/teacher-and-student.png", image_grid(_decoded(work, shown), config.pictures))
    return figures


def save_student(work: Work, student: PromptedUNet) -> None:
    """Save the student as a pipeline that diffusers loads and runs in one step by itself, sealed."""
    disable_progress_bar()
    with model_part(work.config.teacher) as (where, _), tempfile.TemporaryDirectory() as folder:
        pipeline = DiffusionPipeline.from_pretrained(
            where,
            unet=plain_unet(student),
            scheduler=one_step_scheduler(work.noise, work.config.student.timestep_shift),
            low_cpu_mem_usage=False,
        )
        pipeline.save_pretrained(folder)
        save_sealed(work.store, PIPELINE, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        work.chain().save_pretrained(folder)
        work.store.write_folder(CHAIN, Path(folder))


def conclude(
    work: Work, figures: dict[str, Any], pool: Pool | None, seconds: dict[str, float]
) -> dict[str, Any]:
    """Write results and report, and return the headline."""
    results: dict[str, Any] = {"headline": figures, "rows": [], "seconds": seconds}
    if pool is not None:
        results["pool"] = describe_pool(pool)
    write_results(work.store, results)
    work.store.delete("snapshots")
    report = write_report(work.store)
    return figures | {"run": work.config.run, "seconds": round(sum(seconds.values()), 1), "report": report}


def _question(work: Work, teacher: PromptedUNet) -> Question:
    config = work.config
    assert teacher.table is not None
    rows = held_out(len(teacher.table), config.held_out.share, config.seed)[1]
    side, channels = int(teacher.config.sample_size), int(teacher.config.in_channels)
    return pose(config.held_out, rows, (channels, side, side))


def _teacher_answers(work: Work, teacher: PromptedUNet, question: Question) -> Tensor:
    pairs = work.config.pairs
    sampler = build_sampler(pairs.sampler, build_noise_scheduler(work.noise))
    return answer(teacher, sampler, question, pairs.steps, pairs.guidance(), work.config.held_out)


def _student(work: Work, student: PromptedUNet, question: Question, steps: int) -> Tensor:
    return answer(student, work.chain(), question, steps, classifier_free(1.0), work.config.held_out)


def _trained(work: Work, start: PromptedUNet) -> PromptedUNet:
    """Return the network with the run's averaged weights; adapters are stored by themselves and merged."""
    weights, lora = final_weights(work.store), work.config.lora
    if not lora.rank:
        load_weights(start, weights)
        return start
    network, adapters = merged(start, lora, weights)
    with tempfile.TemporaryDirectory() as folder:
        save_lora(folder, lora, adapters)
        work.store.write_folder(LORA, Path(folder))
    return network


@torch.no_grad()
def _decoded(work: Work, latents: list[Tensor]) -> Tensor:
    """Return images [n,3,H,W] in [-1,1] of latents, decoded by the teacher's VAE one by one."""
    with model_part(work.config.teacher, "vae") as (where, options):
        vae = AutoencoderKL.from_pretrained(where, low_cpu_mem_usage=False, **options).eval()
    scaled = torch.cat(latents) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return torch.cat([vae.decode(one[None]).sample for one in scaled]).clamp(-1, 1)


if __name__ == "__main__":
    run_job(main, DistillTextConfig)

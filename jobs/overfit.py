"""How far a panel has learned its real images by heart: logits on those it was shown against others."""

import torch

from actors.recipe import PanelRecipe, build_local_panel
from cluster.checkpoints import latest_checkpoint
from cluster.storage import RunStore
from counterpoint.data import load_data
from jobs.runs import read_config
from jobs.settings import DistillConfig, TrainConfig

MOST = 497
"""Images of each side; as many as the smaller side has, up to this."""


def overfit_gap(config: DistillConfig) -> float | None:
    """Return the mean over heads of (mean logit on shown images - that on held-out ones) / spread.

    Reads the finished run of `config`. The spread is the standard deviation of a head's logits over both
    sides. None if the run has no panel in its checkpoint.
    """
    checkpoint = latest_checkpoint(RunStore(config.run))
    if checkpoint is None or "critics-0" not in checkpoint.files:
        return None
    teacher: TrainConfig = read_config(RunStore(config.teacher), TrainConfig)
    shown = load_data(
        teacher.data.model_copy(update={"limit": config.real_limit or teacher.data.limit})
    ).train
    held_out = load_data(teacher.data).test
    count = min(MOST, len(shown), len(held_out))
    recipe = PanelRecipe(
        config.teacher, config.critics.plain(), teacher.noise, config.seed,
        total_steps=config.adversarial.panel_steps,
    )  # fmt: skip
    panel = build_local_panel(recipe, torch.device("cpu"))
    panel.load(
        {name: checkpoint.tensors(name) for name in checkpoint.files if name.startswith("critics-")}, 0
    )
    gaps = []
    for group in panel.groups:
        seen = group.logits(shown.images[:count], shown.labels[:count], step=0)
        unseen = group.logits(held_out.images[:count], held_out.labels[:count], step=1)
        gaps.append((seen.mean(0) - unseen.mean(0)) / torch.cat([seen, unseen]).std(0).clamp_min(1e-6))
    return float(torch.cat(gaps).mean())

"""Where the checkpoints of a run lie, for those that only look at a run: torch is not loaded for that."""

import re

from cluster.storage import RunStore

FOLDER = "checkpoints"
NEVER_FINISHED = "the checkpoint was never finished"
_STEP = re.compile(r"step-(\d{8,})")


def step_folder(step: int) -> str:
    """Return the folder of the checkpoint of `step` within the run."""
    return f"{FOLDER}/step-{step:08d}"


def checkpoint_steps(store: RunStore) -> list[int]:
    """Return the steps, in order, for which there is a checkpoint directory, whole or not."""
    found = (_STEP.fullmatch(name) for name in store.children(FOLDER))
    return sorted(int(match.group(1)) for match in found if match)

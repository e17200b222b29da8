"""Opening a run's storage, going on with it, and finishing it."""

import json
import logging
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from diffusers import UNet2DModel
from diffusers.utils.logging import disable_progress_bar
from pydantic import ValidationError

from actors.recipe import PIPELINE
from cluster.checkpoints import checkpoint_steps, latest_checkpoint, load_checkpoint
from cluster.environment import describe_environment
from cluster.identity import begin, ended
from cluster.manifest import DamagedCheckpointError
from cluster.sealing import save_sealed
from cluster.storage import RunStore
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.pipeline import ClassConditionalPipeline
from counterpoint.sampling import SamplerConfig, build_sampler
from counterpoint.scheduler import TimestepShiftScheduler
from counterpoint.section import Section
from jobs.config import dump_config
from jobs.config_source import over_defaults
from jobs.run_names import CONFIG, RESULTS

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {
    "run", "teacher", "start", "resume", "trainer", "evaluation", "alarms", "workers", "samplers",
    "critics.actors", "critics.cpus_per_actor", "critics.gpus_per_actor", "critics.threads",
    "critics.snapshot_every", "critics.patience", "critics.replicas", "critics.transport",
}  # fmt: skip
"""Keys that say where a run happens and not what it computes: a resumed run may change them."""


def open_run(
    uri: str, config: Section, resume: bool, in_process: bool, free: Collection[str] = FREE_ON_RESUME
) -> RunStore:
    """Open the storage of a run, write its configuration, environment and identity, and return it.

    A resumed run may change the keys in `free`.

    Raises ValueError if the storage is used and `resume` is off, if a resumed run would compute something
    else than it did, or if other processes could not see the storage.
    """
    if uri.startswith("memory:") and not in_process:
        raise ValueError(
            f"run={uri} lives in one process's memory, which workers do not share: use a path or an object "
            "store, or trainer.workers=0 with critics.actors=0 and evaluation.workers=0"
        )
    check_lasting(uri)
    store = RunStore(uri)
    if store.exists(CONFIG):
        if not resume:
            raise ValueError(
                f"run={uri} is a run already: add resume=true to go on with it, or choose another run"
            )
        _check_same(yaml.safe_load(store.read_text(CONFIG)), config, uri, free)
        _check_whole(store)
    store.write_text(CONFIG, dump_config(config))
    store.write_text("environment.json", json.dumps(describe_environment(), indent=1))
    begin(store)
    return store


def check_lasting(uri: str) -> None:
    """Raise ValueError if a run would be stored in the directory that a submitted job is unpacked into."""
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))  # Ray sets it for a job
    unpacked = settings.get("runtime_env", {}).get("working_dir")
    if unpacked and "://" not in uri and Path(uri).is_relative_to(Path.cwd()):
        raise ValueError(
            f"run={uri} lies in the directory of a submitted job, which Ray deletes: give an absolute path "
            "that all nodes see or a URI such as s3://bucket/run, or submit with storage="
        )


def _check_same(stored: dict[str, Any], config: Section, uri: str, free_keys: Collection[str]) -> None:
    """Raise ValueError unless `config` computes what the stored one did; see `_restored` for missing keys."""
    try:
        stored = _restored(type(config), stored).model_dump(mode="json")
    except ValidationError:
        logger.debug("run=%s was made with what is refused today: compared as it is", uri, exc_info=True)
    before, now = _flat(stored), _flat(config.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in free_keys)
        if not free and before.get(key) != now.get(key):
            raise ValueError(
                f"{key}={now.get(key)} but the run at {uri} was made with {before.get(key)}: resume it with "
                "the configuration stored there, or choose another run"
            )


def _check_whole(store: RunStore) -> None:
    """Say where a run goes on; ValueError if all its checkpoints are damaged: it would begin anew unasked."""
    steps, newest = checkpoint_steps(store), latest_checkpoint(store)
    if newest is not None:
        logger.info("run=%s goes on from its checkpoint of step %d", store.uri, newest.step)
    elif steps:
        try:
            load_checkpoint(store, steps[-1])
        except DamagedCheckpointError as damage:
            raise ValueError(
                f"run={store.uri} cannot be resumed, none of its {len(steps)} checkpoints is whole: "
                f"{damage}: restore that file, or delete checkpoints/ and snapshots/ to begin anew"
            ) from damage


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: list(tree) if isinstance(tree, tuple) else tree}


def read_config(store: RunStore, model: type[Section]) -> Any:
    """Return the resolved configuration stored with a run; raises ValueError if there is none."""
    if not store.exists(CONFIG):
        raise ValueError(f"{store.uri} is not a run: it has no {CONFIG}")
    return _restored(model, yaml.safe_load(store.read_text(CONFIG)))


def _restored(model: type[Section], stored: dict[str, Any]) -> Section:
    """Return the configuration in `stored`, in which a key that came later has the default of its field.

    Raises pydantic's ValidationError if it holds a key that is gone, or a value that is refused by now.
    """
    return model.model_validate(over_defaults(model, stored))


def read_results(store: RunStore) -> dict[str, Any]:
    """Return the results of a finished run; raises ValueError if it did not finish."""
    if not store.exists(RESULTS):
        raise ValueError(f"{store.uri} has not finished: it has no {RESULTS}; resume it first")
    results: dict[str, Any] = json.loads(store.read_text(RESULTS))
    return results


def write_results(store: RunStore, results: dict[str, Any]) -> None:
    """Store the results of a run, as the last thing that makes it a finished one."""
    store.write_text(RESULTS, json.dumps(results, indent=1))
    ended("done", store)


def final_weights(store: RunStore) -> dict[str, Any]:
    """Return the averaged weights of the newest checkpoint."""
    checkpoint = latest_checkpoint(store)
    if checkpoint is None:
        raise ValueError(f"{store.uri} has no whole checkpoint: resume or repeat the run")
    return checkpoint.tensors("weights")


def save_pipeline(store: RunStore, unet: UNet2DModel, scheduler: Any) -> ClassConditionalPipeline:
    """Save a pipeline that diffusers' `from_pretrained` loads, sealed, under `pipeline/` of the run."""
    pipeline = ClassConditionalPipeline(unet, scheduler)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        save_sealed(store, PIPELINE, Path(folder))
    return pipeline


def with_sampler(
    pipeline: ClassConditionalPipeline, sampler: SamplerConfig | None, noise: NoiseConfig
) -> ClassConditionalPipeline:
    """Return the pipeline with another sampler over the forward process that its network was trained on.

    Raises ValueError for a distilled student, whose few steps are those of its own scheduler.
    """
    if sampler is None:
        return pipeline
    if isinstance(pipeline.scheduler, TimestepShiftScheduler):
        raise ValueError(
            f"sampler.scheduler={sampler.scheduler}: a distilled student takes its own steps: leave it "
            "unset, or give a teacher's run"
        )
    return ClassConditionalPipeline(pipeline.unet, build_sampler(sampler, build_noise_scheduler(noise)))


def load_pipeline(store: RunStore) -> ClassConditionalPipeline:
    """Load the pipeline of a finished run from any storage."""
    if not store.exists(f"{PIPELINE}/model_index.json"):
        raise ValueError(f"{store.uri} has no saved pipeline: give the URI of a finished run")
    disable_progress_bar()
    with store.local_folder(PIPELINE) as folder:
        return ClassConditionalPipeline.from_pretrained(folder, low_cpu_mem_usage=False)

"""Train a vision-language-action policy by imitation: `python -m jobs.train configs/vla/policy.yaml`."""

import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from actors.policies import PolicyRecipe
from actors.sampler import POLICY
from actors.training import TrainerConfig
from actors.worker import LoopSpec
from cluster.metrics_log import read_metrics
from cluster.sealing import save_sealed
from cluster.storage import RunStore
from counterpoint.actions.config import TokenizerConfig
from counterpoint.optimization import load_weights
from counterpoint.policies.bundle import check_sample
from counterpoint.policies.compact import CompactConfig
from counterpoint.policies.training import PolicyTrainingConfig
from counterpoint.section import Section
from jobs import collect
from jobs.batch_sizes import check_batch_sizes
from jobs.collect import CollectConfig
from jobs.config import run_job
from jobs.launch import launch, stopped
from jobs.report import write_report
from jobs.run_names import RunUri
from jobs.runs import RESULTS, final_weights, open_run, read_config, write_results
from jobs.scoring import timed


class PolicyTrainConfig(Section):
    """Train a policy that emits chunks of actions as tokens."""

    learner: Literal["policy"] = "policy"
    """What is trained: policy (this), or diffusion or linear, which have configurations of their own."""
    run: RunUri = "runs/vla/policy"
    """URI of the run's storage: a local path, s3://, gs:// or whatever fsspec knows."""
    resume: bool = False
    """Go on with the run that is there; without it a used `run` is refused."""
    seed: int = 0
    """Seed of everything random in the run."""
    demonstrations: RunUri = "runs/vla/demos"
    """URI of a finished run of jobs.collect."""
    collect: CollectConfig | None = None
    """Collects the demonstrations first where that run is not finished; its `run` is `demonstrations`."""
    episodes: int | None = Field(default=None, ge=1)
    """Imitate only so many demonstrations, those of the lowest seeds; none imitates all."""
    horizon: int = Field(default=4, ge=1)
    """Control steps of a chunk."""
    execute: int = Field(default=4, ge=1)
    """Control steps of a chunk that are executed before the next decision."""
    words: int = Field(default=8, ge=1)
    """Most words of an instruction."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How chunks become tokens."""
    network: CompactConfig = CompactConfig()
    """The network."""
    training: PolicyTrainingConfig = PolicyTrainingConfig()
    """Perception, imitation, condition dropout."""
    trainer: TrainerConfig = TrainerConfig()
    """Workers, checkpoints and failures."""

    @model_validator(mode="after")
    def _check(self) -> "PolicyTrainConfig":
        sizes = {"training.batch_size": self.training.batch_size}
        if self.network.vision.kind == "pointer":
            sizes["training.perception.batch_size"] = self.training.perception.batch_size
        check_batch_sizes(sizes, self.trainer)
        return self


def main(config: PolicyTrainConfig) -> dict[str, Any]:
    """Train, save the policy's sealed bundle under `policy/` of the run, and return the headline figures."""
    seconds: dict[str, float] = {}
    with timed(seconds, "collect"):
        collected = collected_demonstrations(config)
    store = open_run(config.run, config, config.resume, in_process=config.trainer.workers == 0)
    recipe = recipe_of(config, collected)
    with launch("policy", config.trainer) as run:
        with timed(seconds, "train"):
            spec = LoopSpec(
                config.run, recipe, config.trainer.checkpoint_every, config.trainer.keep_checkpoints
            )
            result = run(lambda _: spec)
        if not result.finished:
            return stopped(config.run, result)
    return conclude(config, store, recipe, seconds)


def collected_demonstrations(config: PolicyTrainConfig) -> CollectConfig:
    """Return the configuration of the demonstrations' run, after collecting what is missing.

    Raises ValueError if the run is not finished and the configuration does not say how to collect.
    """
    store = RunStore(config.demonstrations)
    if not store.exists(RESULTS):
        if config.collect is None:
            raise ValueError(
                f"demonstrations={config.demonstrations} is not a finished run: make it with "
                f"`python -m jobs.collect configs/vla/demos.yaml run={config.demonstrations}`"
            )
        started = store.exists("config.yaml")
        collect.main(config.collect.model_copy(update={"run": config.demonstrations, "resume": started}))
    found: CollectConfig = read_config(store, CollectConfig)
    return found


def recipe_of(config: PolicyTrainConfig, collected: CollectConfig) -> PolicyRecipe:
    """Return what the trainer's workers build the policy from."""
    environment = collected.environment
    return PolicyRecipe(
        f"{config.demonstrations.rstrip('/')}/{collect.FOLDER}", config.episodes, environment.instructions,
        environment.observation_space(), environment.action_space(config.horizon, config.execute),
        config.tokenizer, config.network, config.words, config.training, config.seed,
        config.trainer.accumulate,
    )  # fmt: skip


def conclude(
    config: PolicyTrainConfig, store: RunStore, recipe: PolicyRecipe, seconds: dict[str, float]
) -> dict[str, Any]:
    """Save and seal the bundle, write results and report, and return the headline."""
    shown, _, chunks = recipe.data()
    bundle = recipe.bundle(shown, chunks)
    load_weights(bundle.policy, final_weights(store))
    bundle.policy.eval()
    with tempfile.TemporaryDirectory() as folder:
        bundle.save(Path(folder))
        save_sealed(store, POLICY, Path(folder))
    last = read_metrics(store)[-1]
    headline: dict[str, Any] = {
        "loss": last["loss"],
        "token_accuracy": last["token_accuracy"],
        "parameters": sum(p.numel() for p in bundle.policy.parameters()),
        "episodes": len(set(shown.episodes.tolist())),
        "frames": len(shown),
    }
    write_results(store, {"headline": headline, "sample": check_sample(bundle), "seconds": seconds})
    return headline | {
        "run": config.run, "seconds": round(sum(seconds.values()), 1), "report": write_report(store),
    }  # fmt: skip


if __name__ == "__main__":
    run_job(main, PolicyTrainConfig)

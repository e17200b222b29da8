"""Every YAML file in `configs` is one that its verb takes, and so is the README's command with it."""

import re
import shlex
from pathlib import Path

import pytest

from counterpoint.section import Section
from jobs.ablate import AblateConfig
from jobs.bench_memory import MemoryBenchConfig
from jobs.bench_sampler import SamplerBenchConfig
from jobs.bench_scale import ScaleBenchConfig
from jobs.bench_sdxl import SdxlBenchConfig
from jobs.bench_serve import ServeBenchConfig
from jobs.chaos import ChaosConfig
from jobs.chaos_serve import ServeChaosConfig
from jobs.chaos_tune import TuneChaosConfig
from jobs.claim import ClaimConfig
from jobs.collect import CollectConfig
from jobs.config import load_config
from jobs.demo import DemoConfig
from jobs.encode import EncodeConfig
from jobs.linearize import LinearizeConfig
from jobs.plan_settings import plan_of
from jobs.rollout import RolloutConfig
from jobs.serve import ServeConfig
from jobs.settings import DistillConfig, TrainConfig
from jobs.text_settings import DistillTextConfig
from jobs.train_policy import PolicyTrainConfig
from jobs.tune_settings import TuneConfig
from jobs.tune_study import TuneStudyConfig

ROOT = Path(__file__).parent.parent
FILES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
MODELS: dict[str, type[Section]] = {
    "bench/memory": MemoryBenchConfig, "bench/scale": ScaleBenchConfig, "bench/sdxl": SdxlBenchConfig,
    "digits/ablation": AblateConfig, "digits/chaos": ChaosConfig, "digits/chaos_demo": DemoConfig,
    "digits/curve": TrainConfig,
    "digits/dit": TrainConfig, "digits/lit": LinearizeConfig,
    "digits/demo": DemoConfig, "digits/distill": DistillConfig, "digits/teacher": TrainConfig,
    "digits/claims_teacher": TrainConfig,
    "digits/flow": TrainConfig, "digits/warmup": DistillConfig, "digits/sweep": TuneConfig,
    "digits/pbt": TuneConfig,
    "digits/pbt_study": TuneStudyConfig, "digits/chaos_tune": TuneChaosConfig,
    "digits/chaos_teacher": TrainConfig,
    "sdxl/distill": DistillTextConfig, "sdxl/tiny": DistillTextConfig, "sdxl/tiny_encode": EncodeConfig,
    "serve/bench": ServeBenchConfig, "serve/chaos": ServeChaosConfig, "serve/digits": ServeConfig,
    "serve/vla": ServeConfig,
    "textures/ablation": AblateConfig, "textures/distill": DistillConfig, "textures/teacher": TrainConfig,
    "textures/flow": TrainConfig, "textures/warmup": DistillConfig,
    "vla/bench_gpu": SamplerBenchConfig, "vla/compare": RolloutConfig, "vla/demos": CollectConfig,
    "vla/joint": PolicyTrainConfig, "vla/policy": PolicyTrainConfig, "vla/rollout": RolloutConfig,
    "vla/sweep": RolloutConfig, "vla/tune": TuneConfig,
}  # fmt: skip
"""The verb's model of each file; jobs.plan chooses its own."""


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_file_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    file = f"configs/{name}"
    model = ClaimConfig if name.startswith("claims/") else MODELS.get(name.removesuffix(".yaml"))
    if name.endswith("plan.yaml"):
        model = plan_of([file])
    assert model is not None, f"{name} is in no verb's hands: name its model here"
    load_config(model, [file])


def readme_commands() -> list[tuple[str, list[str]]]:
    """Verb and arguments of the README's commands, of benchmarks and submitted jobs those of their own."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if "python -m jobs." in line and line.count("`") % 2 == 0]
    found = [re.split(r"`|&&|#", part)[0] for line in lines for part in line.split("python -m jobs.")[1:]]
    commands = [
        words[words.index("--") + 1 :] if "--" in words else words for words in map(shlex.split, found)
    ]
    return [(w[0], w[2:] if w[0] == "bench" else w[1:]) for w in commands if w]


COMMANDS = [
    (verb, arguments)
    for verb, arguments in readme_commands()
    if arguments and arguments[0].startswith("configs/") and all("=" in word for word in arguments[1:])
]
"""Those of a file of the repository and settings, as they stand."""


@pytest.mark.parametrize(("verb", "arguments"), COMMANDS, ids=[" ".join([v, *a]) for v, a in COMMANDS])
def test_a_command_of_the_readme_is_taken(
    verb: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert (ROOT / "jobs" / f"{verb}.py").is_file()
    model = MODELS[arguments[0].removeprefix("configs/").removesuffix(".yaml")]
    load_config(model, arguments)


@pytest.mark.parametrize(
    "changes",
    [
        ["lora.rank=64"],
        ["trainer.strategy.zero_stage=3", "trainer.strategy.offload=true"],
        ["trainer.workers=1", "trainer.accumulate=20", "critics.actors=0", "critics.wire_dtype=float32"],
    ],
    ids=["adapters", "sharded", "one GPU"],
)
def test_what_the_full_size_configuration_says_of_itself(
    changes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(DistillTextConfig, ["configs/sdxl/distill.yaml", *changes])
    micro = config.adversarial.batch_size / (config.trainer.workers * config.trainer.accumulate)
    assert micro == 5
    # Four levels, three kinds and SDXL's ten maps.
    heads = len(config.critics.noise_levels) * len(config.critics.kinds) * 10 * config.critics.heads_per_slot
    assert (config.critics.order, heads) == ("student_first", 480)

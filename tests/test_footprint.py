"""What is followed on paper against the same done for real, and the arithmetic against simulations."""

import itertools

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from actors.wire import pack, pack_contribution, pack_verdict
from counterpoint.critics.config import CriticsConfig
from counterpoint.critics.encoder import FrozenEncoder
from counterpoint.critics.group import CriticGroup, Samples
from counterpoint.critics.pool import build_pool
from counterpoint.critics.replicas import Contribution
from counterpoint.diffusion import NoiseConfig, build_noise_scheduler
from counterpoint.footprint.group import trace_group
from counterpoint.footprint.learner import LearnerTrace, gathered, trace_learner
from counterpoint.footprint.micro_steps import student_micro_step, teacher_micro_step
from counterpoint.footprint.sharding import exchanged_per_step, ring_all_gather, ring_all_reduce, share_out
from counterpoint.footprint.tracing import Ledger, on_paper
from counterpoint.footprint.wire import panel_traffic
from counterpoint.optimization import OptimizerConfig
from counterpoint.strategies.config import StrategyConfig
from counterpoint.student import StudentConfig
from counterpoint.unet import UNetConfig, build_unet
from jobs.bench_memory import MemoryBenchConfig, main
from jobs.memory_probe import MemoryCase
from jobs.sdxl_parts import SDXL

UNET = UNetConfig(
    block_out_channels=(32, 64), attention=(False, True), mid_attention=True, norm_num_groups=16
)
SHAPE = (3, 16, 16)
NOISE = build_noise_scheduler(NoiseConfig())


def unet() -> UNet2DModel:
    return build_unet(UNET, 3, 16, 10, 0).train()


def followed(ledger: Ledger, strategy: StrategyConfig, micros: int = 1) -> LearnerTrace:
    step = teacher_micro_step(NOISE, SHAPE, 8)
    return trace_learner(ledger, unet(), step, OptimizerConfig(), strategy, micros)


@pytest.mark.parametrize("strategy", [StrategyConfig(), StrategyConfig(activation_checkpointing=True)])
@pytest.mark.parametrize("micros", [1, 2])
def test_a_step_on_paper_holds_what_a_real_one_holds(strategy: StrategyConfig, micros: int) -> None:
    with on_paper() as paper:
        expected = followed(paper, strategy, micros)
    with Ledger() as real:
        found = followed(real, strategy, micros)
    assert found.parameters == expected.parameters == 4 * sum(p.numel() for p in unet().parameters())
    assert found.optimizer == expected.optimizer
    assert found.average == expected.average == found.parameters
    # Frequencies of the time embedding and the like are numbers for real and constants on paper.
    for name in ("activations", "step", "beside", "update"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=0.01)


def test_saved_activations_are_those_that_autograd_saves() -> None:
    network, saved = unet(), {}
    own = {t.untyped_storage().data_ptr() for t in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        teacher_micro_step(NOISE, SHAPE, 8)(network)
    with on_paper() as paper:
        expected = followed(paper, StrategyConfig())
    assert sum(saved.values()) == pytest.approx(expected.activations, rel=0.03)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    def of(samples: int, strategy: StrategyConfig) -> LearnerTrace:
        with on_paper() as paper:
            step = student_micro_step(NOISE, SHAPE, samples, StudentConfig())
            return trace_learner(paper, unet(), step, OptimizerConfig(), strategy)

    small, large = of(8, StrategyConfig()), of(16, StrategyConfig())
    assert large.activations == pytest.approx(2 * small.activations, rel=0.02)
    assert of(8, StrategyConfig(activation_checkpointing=True)).activations < 0.7 * small.activations


@pytest.mark.parametrize(
    "config", [CriticsConfig(width=4), CriticsConfig(width=4, panel="all", shuffled_negatives=True)]
)
def test_a_judgement_on_paper_holds_what_a_real_one_holds(config: CriticsConfig) -> None:
    def encoder() -> nn.Module:
        return FrozenEncoder(unet())

    with on_paper() as paper:
        expected = trace_group(paper, encoder, config, 8, NOISE.alphas_cumprod)
    eyes = FrozenEncoder(unet())
    pool = build_pool(config, eyes.map_shapes(16), eyes.map_shapes(8), 16, NOISE.alphas_cumprod, 0)
    with Ledger() as real:
        group = CriticGroup(pool, 0, eyes, NOISE.alphas_cumprod)
        held = real.mark()
        fake, images = torch.zeros(2, 8, *SHAPE)
        group.judge(Samples(0, fake, images, torch.zeros(8, dtype=torch.long)))
        working = real.peak - held
    rows = [bank.rows for bank in group.banks]
    assert expected.heads == sum(map(len, rows))
    assert expected.parameters == sum(r.nbytes for r in rows)
    assert expected.optimizer >= 2 * expected.parameters
    assert expected.gradients + expected.activations == pytest.approx(working, rel=0.03)


def test_a_ring_sends_what_the_formulas_say() -> None:
    for ranks, size in itertools.product((1, 2, 3, 5), (60, 120)):
        # Chunk c starts at rank c and is summed up on its way round; then the sums go round once more.
        sent = [0] * ranks
        for chunk, hop in itertools.product(range(ranks), range(ranks - 1)):
            sent[(chunk + hop) % ranks] += size // ranks
        assert sent == [ring_all_gather(size, ranks)] * ranks
        assert ring_all_reduce(size, ranks) == 2 * sent[0]


def test_zero_holds_and_sends_what_its_paper_says() -> None:
    trace = LearnerTrace(1000, 100, 0, 4000, 0, 8000, 4000, 0, 0, 4000, 0, 0)
    bf16 = {"precision": "bf16"}
    whole = share_out(trace, StrategyConfig(), 1)
    assert whole.host == 4000 + 4000 + 8000 + 4000
    one, two, three = (
        share_out(trace, StrategyConfig(name="deepspeed", zero_stage=stage, **bf16), 4) for stage in (1, 2, 3)
    )
    assert [h.optimizer for h in (one, two, three)] == [(4000 + 8000) // 4] * 3
    assert [h.parameters for h in (one, two, three)] == [2000, 2000, 500]
    assert one.gradients - two.gradients == 2000 - 500
    sharded = share_out(trace, StrategyConfig(name="fsdp"), 4)
    assert (sharded.parameters, sharded.gradients, sharded.optimizer, sharded.average) == (
        1000,
        1000,
        2000,
        1000,
    )
    assert share_out(trace, StrategyConfig(name="fsdp"), 4, micros=2).gradients == 4000

    def sent(**fields: object) -> int:
        return exchanged_per_step(1000, StrategyConfig(**fields), 4)

    volume = ring_all_gather(2000, 4)
    assert sent(name="deepspeed", zero_stage=2, **bf16) == 2 * volume
    assert sent(name="deepspeed", zero_stage=3, **bf16) == 3 * volume
    assert sent() == ring_all_reduce(4000, 4)
    assert sent(name="fsdp") == 3 * ring_all_gather(4000, 4)


@pytest.mark.parametrize(("dtype", "number"), [("float32", 4), ("bfloat16", 2)])
def test_wire_bytes_are_those_of_packed_messages(dtype: str, number: int) -> None:
    config = CriticsConfig(width=4, levels_per_step=1)
    eyes = FrozenEncoder(unet())
    pool = build_pool(config, eyes.map_shapes(16), eyes.map_shapes(8), 16, NOISE.alphas_cumprod, 0)
    group = CriticGroup(pool, 0, eyes, NOISE.alphas_cumprod)
    samples = Samples(0, torch.zeros(6, *SHAPE), torch.zeros(6, *SHAPE), torch.zeros(6, dtype=torch.long))
    verdict = group.judge(samples)
    parts = pack_verdict(verdict, [3, 3], dtype)  # type: ignore[arg-type]
    judging = sum(slot.shape.size for slot in pool.slots)
    said = Contribution(6, 6, 0.0, verdict.real_logits, verdict.fake_logits, (torch.zeros(judging),))
    traffic = panel_traffic(config, SHAPE, 6, pool.levels, judging, 2, replicas=2, number=number)

    def size(message: dict[str, object]) -> int:
        values = [v for value in message.values() for v in (value if isinstance(value, list) else [value])]
        return sum(getattr(value, "nbytes", 0) for value in values)

    assert traffic.to_critics == size(pack(samples, dtype))  # type: ignore[arg-type]
    assert traffic.to_trainers == sum(map(size, parts))
    assert traffic.between_replicas == 2 * size(pack_contribution(said))


def test_blocks_cover_all_parameters_once() -> None:
    network = nn.Sequential()
    network.add_module("blocks", nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 8)]))
    network.add_module("head", nn.Linear(3, 1))
    assert gathered(network) == (40, 4)


@pytest.mark.slow  # two processes that fill memory; the tests above count every tensor of a real step
def test_measured_memory_is_what_was_estimated() -> None:
    case = {"samples": 12, "side": 32}
    cases = {"trainer": MemoryCase(**case), "critics": MemoryCase(role="critics", **case)}
    result = main(MemoryBenchConfig(cases=cases))
    assert result["trainer"]["estimated_mb"] > 500
    assert result["worst_error"] < 0.15


@pytest.mark.gpu
def test_a_full_sdxl_unet_holds_on_a_gpu_what_was_estimated() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device with 80 GiB")
    from counterpoint.prompted import PromptedUNet

    def step(network: object, device: str) -> Tensor:
        inputs = {
            "encoder_hidden_states": torch.zeros(1, 77, 2048, device=device),
            "added_cond_kwargs": {
                "text_embeds": torch.zeros(1, 1280, device=device),
                "time_ids": torch.zeros(1, 6, device=device),
            },
        }
        x = torch.zeros(1, 4, 128, 128, device=device)
        out: Tensor = network(x, torch.zeros(1, device=device), **inputs).sample  # type: ignore[operator]
        return out.float().square().mean()

    with on_paper() as paper:
        strategy = StrategyConfig(precision="bf16", activation_checkpointing=True)
        network = PromptedUNet.from_config(SDXL)
        expected = trace_learner(paper, network, lambda n: step(n, "cpu"), OptimizerConfig(), strategy)
    with torch.device("cuda"):
        real = PromptedUNet.from_config(SDXL)
    real.enable_gradient_checkpointing()
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = step(real, "cuda")
    loss.backward()
    found = torch.cuda.max_memory_allocated()
    assert found == pytest.approx(expected.parameters + expected.step, rel=0.15)

"""The stated figures of a simulated GPU cluster, each with its source, and what a step costs by them."""

from pydantic import Field

from counterpoint.section import Section
from jobs.scale_flops import StepFlops
from jobs.scale_step import Cost, Costs


class Figure(Section):
    """A number with where it comes from."""

    value: float
    """The number, in the unit of its field."""
    source: str = Field(min_length=1)
    """Data sheet, measurement, or `assumed`."""


def assumed(value: float, why: str = "") -> Figure:
    """Return a figure that nobody measured."""
    return Figure(value=value, source=f"assumed{why and ': '}{why}")


class ClusterFigures(Section):
    """One kind of GPU and the network around it."""

    name: str = "H100 SXM"
    """What results call it."""
    peak: Figure = Figure(
        value=989.4, source="NVIDIA H100 data sheet, SXM, bfloat16 tensor cores without sparsity"
    )
    """TFLOP/s of dense bfloat16 matrix products."""
    utilisation: Figure = assumed(0.40, "eager bfloat16 training of diffusion UNets reaches 0.3 to 0.5")
    """Share of the peak that the modules' own operations reach."""
    memory: Figure = Figure(value=3.35, source="NVIDIA H100 data sheet, SXM, HBM3")
    """TB/s of GPU memory, by which an optimizer step goes."""
    launch: Figure = assumed(8.0, "some thousands of kernels, little hidden")
    """Milliseconds that a pass through a network costs however few the samples."""
    gpus_per_node: int = Field(default=8, ge=1)
    """GPUs of a machine."""
    inner: Figure = Figure(
        value=450.0, source="NVIDIA H100 data sheet: NVLink 900 GB/s, both directions together"
    )
    """GB/s of one GPU to the others of its machine, in one direction."""
    outer: Figure = assumed(50.0, "one 400 Gb/s port a GPU, as in DGX H100")
    """GB/s of one GPU to other machines, in one direction."""
    reached: Figure = assumed(0.8)
    """Share of those bandwidths that collectives and copies reach."""
    inner_latency: Figure = assumed(10.0)
    """Microseconds of one hop within a machine, launch included."""
    outer_latency: Figure = assumed(30.0)
    """Microseconds of one hop between machines, launch included."""
    call: Figure = Figure(
        value=0.4, source="measured on two CPU cores: 2,600 pipelined actor calls a second, Ray 2.60"
    )
    """Milliseconds that an actor call takes of the process at each end."""
    round_trip: Figure = Figure(
        value=1.4, source="measured on two CPU cores: the shortest actor call and answer, Ray 2.60"
    )
    """Milliseconds of an actor call and its answer, of which each takes half."""
    copy_rate: Figure = Figure(
        value=1.5,
        source="measured on two CPU cores: 100 MB of numpy between actors in 0.05 to 0.09 s, Ray 2.60",
    )
    """GB/s at which a message is copied into and out of the object store, at each end."""
    direct_rate: Figure = Figure(
        value=50.0, source="assumed: a GPU-to-GPU transport at PCIe 5 x16 or one network port"
    )
    """GB/s of the same with a direct transport (NCCL, NIXL), which copies nothing."""
    overlap: Figure = assumed(0.7, "buckets of DDP, all but the last hidden behind backward")
    """Share of the backward pass behind which gradients are averaged."""
    jitter: Figure = assumed(0.03, "clocks and neighbours")
    """Standard deviation of the logarithm of every computation's duration, drawn anew each time."""


class Workload(Section):
    """The distillation that is simulated; the network is SDXL's unless `unet` says otherwise."""

    batch_per_gpu: int = Field(default=16, ge=1)
    """Samples of a step per GPU of the cluster, whatever the GPU does: weak scaling."""
    teacher_steps: int = Field(default=4, ge=0)
    """Evaluations of the teacher per sample within the step (NitroFusion: 4 or 8); 0 for stored samples."""
    gradient_bytes: int = Field(default=2, ge=1)
    """Bytes of a number when the student's gradients are averaged."""
    optimizer_bytes: int = Field(default=28, ge=1)
    """Bytes of GPU memory read and written per parameter and optimizer step: float32 weights and moments
    there and back, the gradient, the bfloat16 weights."""
    prompt_bytes: int = Field(default=8, ge=0)
    """Bytes of a sample's condition: the row of the prompt table."""


TERA, GIGA, MILLI, MICRO = 1e12, 1e9, 1e-3, 1e-6


def step_costs(
    flops: StepFlops, figures: ClusterFigures, work: Workload, wire_bytes: int, direct: bool
) -> Costs:
    """Return what a step costs on one GPU of a cluster.

    `wire_bytes` is the size of a number in a message, and `direct` sends from GPU to GPU.
    """
    rate = figures.peak.value * TERA * figures.utilisation.value
    launch = figures.launch.value * MILLI

    def cost(operations: float, passes: float = 1.0) -> Cost:
        return Cost(launch * passes, operations / rate)

    optimizer = flops.parameters * work.optimizer_bytes / (figures.memory.value * TERA)
    heads = flops.head_parameters * work.optimizer_bytes / (figures.memory.value * TERA)
    learn = cost(flops.learn, 3.0)
    return Costs(
        sampling=cost(work.teacher_steps * flops.forward, work.teacher_steps),
        forward=cost(flops.forward),
        backward=cost(flops.backward, 2.0),
        optimizer=optimizer + launch,
        learn=Cost(learn.fixed + heads, learn.each),
        judge=cost(flops.judge, 2.0),
        pack=Cost(),
        call=figures.call.value * MILLI,
        copy_rate=(figures.direct_rate if direct else figures.copy_rate).value * GIGA,
        sample_bytes=2 * flops.sample * wire_bytes + work.prompt_bytes,
        answer_bytes=flops.sample * wire_bytes,
    )

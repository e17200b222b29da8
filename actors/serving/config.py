"""What is served, to whom, and how much of it at once."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator

from counterpoint.environments.config import EnvironmentConfig
from counterpoint.section import Section

ModelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class KeyConfig(Section):
    """One bearer token that is let in; `python -m jobs.serve key NAME` makes one."""

    name: str = Field(min_length=1, max_length=64)
    """Whose it is; appears in metrics and logs, the token never does."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the token in hex. Tokens are 256 random bits, so that no salt or slow hash is needed."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests a minute, in bursts of at most a tenth; none for no limit; counted per gateway."""


class LimitsConfig(Section):
    """What a request may ask for, and how long it may take."""

    max_body_bytes: int = Field(default=8 * 2**20, ge=1024)
    """Bytes of a request's body, and of a WebSocket frame."""
    max_images: int = Field(default=10, ge=1)
    """Images of a request (`n`)."""
    max_image_side: int = Field(default=1024, ge=1)
    """Pixels of the longer side of an image, asked for or sent."""
    max_candidates: int = Field(default=16, ge=1)
    """Candidates of a decision (`num_candidates`)."""
    max_sessions: int = Field(default=64, ge=1)
    """WebSocket sessions open at once, per gateway replica."""
    max_queue: int = Field(default=128, ge=1)
    """Requests under way at once, waiting ones included, per gateway; past it a 429 with Retry-After."""
    deadline_s: float = Field(default=30.0, gt=0.0)
    """Seconds after which a request is given up with a 504; a client may ask for less, `x-deadline-ms`."""
    retries: int = Field(default=3, ge=0)
    """Times a request is sent again after its replica died; it carries its seed, so all answers agree."""


class ReplicasConfig(Section):
    """How many processes host a deployment, and what each reserves."""

    count: int = Field(default=1, ge=1)
    """Replicas, or the fewest of them where `most` is given."""
    most: int | None = Field(default=None, ge=1)
    """Scale up to so many; none for a fixed number."""
    target_ongoing: float = Field(default=8.0, gt=0.0)
    """Requests under way per replica that scaling aims for."""
    cpus: float = Field(default=0.5, ge=0.0)
    """Logical CPUs reserved for each."""
    gpus: float = Field(default=0.0, ge=0.0)
    """GPUs reserved for each; several may share one, such as 0.25."""
    threads: int = Field(default=1, ge=1)
    """Threads of each replica's maths."""

    @model_validator(mode="after")
    def _check(self) -> "ReplicasConfig":
        if self.most is not None and self.most < self.count:
            raise ValueError(f"most={self.most} is below count={self.count}: raise it, or leave it out")
        return self


class BatchingConfig(Section):
    """How requests meet in a batch."""

    max_batch: int = Field(default=16, ge=1)
    """Rows of one evaluation of the network: images (twice with guidance), or observations."""
    max_wait: float = Field(default=0.005, ge=0.0)
    """Seconds for which a request that finds the network idle waits for others."""
    exact: bool = True
    """Pad batches to sizes at which a row's bits are those of any other such size, found out by trying when a
    checkpoint is loaded; off, a result may differ in its last bits with the neighbours, and is sooner there
    when the service is idle."""


class ImageModelConfig(Section):
    """A served generator."""

    name: ModelName
    """What clients call it."""
    checkpoint: str
    """RUN or RUN@STEP, a run below the service's root: its pipeline, with the weights of a step if given."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their labels; prompts may use them or the labels' numbers."""
    max_steps: int = Field(default=4, ge=1)
    """Most num_inference_steps of a request; a student takes 1 to 4."""


class PolicyModelConfig(Section):
    """A served robot policy."""

    name: ModelName
    """What clients call it."""
    checkpoint: str
    """RUN or RUN@STEP, a run below the service's root: its policy, with the weights of a step if given."""
    keys: dict[str, str] = {}
    """From keys of WebSocket observations to camera names, "state" or "prompt", beside those that are
    understood anyway (`observation/image`, `observation/<camera>`, `observation/state`, `prompt` ...)."""


class HostedConfig(Section):
    """The deployment that hosts models of one kind."""

    replicas: ReplicasConfig = ReplicasConfig()
    """Processes."""
    batching: BatchingConfig = BatchingConfig()
    """Batches."""
    resident: int = Field(default=3, ge=1)
    """Models that a replica keeps loaded; the least recently used goes first."""
    unlisted: bool = False
    """Whether clients may also name any checkpoint under the root as their model."""
    devices: str | None = None
    """Torch device of the models; none takes the GPU where a replica has one."""


class ImagesConfig(HostedConfig):
    """Image generators."""

    models: tuple[ImageModelConfig, ...] = ()
    """The first is the default."""


class ActionsConfig(HostedConfig):
    """Robot policies."""

    models: tuple[PolicyModelConfig, ...] = ()
    """The first is the default."""
    selection: dict[str, Any] = {}
    """Settings of the selection that requests do not give (see SelectionConfig), such as mask: text."""


class SimulatorConfig(Section):
    """A simulator beside the policies, in which the page plays episodes."""

    environment: EnvironmentConfig = EnvironmentConfig()
    """The task."""
    cpus: float = Field(default=0.25, ge=0.0)
    """Logical CPUs reserved for it."""


class ServiceConfig(Section):
    """One service: models behind HTTP on a Ray cluster."""

    name: ModelName = "counterpoint"
    """Name of the Serve application."""
    root: str = "runs"
    """URI below which all checkpoints lie; none outside it can be named."""
    host: str = "127.0.0.1"
    """Address that is listened on; 0.0.0.0 lets other machines in, see `keys`."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port that is listened on."""
    keys: tuple[KeyConfig, ...] = ()
    """Bearer tokens that are let in; without any, the service is open to whoever reaches it."""
    limits: LimitsConfig = LimitsConfig()
    """What a request may ask for."""
    gateways: ReplicasConfig = ReplicasConfig(cpus=0.25)
    """Processes that speak HTTP."""
    images: ImagesConfig = ImagesConfig()
    """Image generators."""
    actions: ActionsConfig = ActionsConfig()
    """Robot policies."""
    simulator: SimulatorConfig | None = None
    """A simulator for the page; none for no episodes."""

    @model_validator(mode="after")
    def _check(self) -> "ServiceConfig":
        names = [model.name for model in self.images.models] + [model.name for model in self.actions.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"models: {twice[0]} is the name of two: give each its own")
        if not names:
            raise ValueError("images.models and actions.models are empty: name a checkpoint to serve")
        if self.simulator is not None and not self.actions.models:
            raise ValueError("simulator has no policy to play: add one to actions.models, or leave it out")
        return self

"""Configurations of `jobs.serve` and its verbs."""

from pydantic import Field

from actors.serving.config import ServiceConfig
from counterpoint.section import Section
from jobs.run_names import RunUri


class ServeConfig(ServiceConfig):
    """Serve models behind HTTP; `python -m jobs.serve CONFIG`."""

    root: RunUri = "runs"
    """URI below which all checkpoints lie; none outside it can be named."""
    check: bool = False
    """Only check the configuration and every checkpoint that it names, and deploy nothing."""
    timeout_s: float = Field(default=300.0, gt=0.0)
    """Seconds in which the service has to come up."""


class ManifestConfig(ServeConfig):
    """Write what `serve deploy` takes, and RayService as serveConfigV2; `jobs.serve config CONFIG`."""

    out: str = "serve.yaml"
    """The file to write."""


class ServiceAddress(Section):
    """Which running service is meant."""

    service: str = "counterpoint"
    """The service's name."""
    dashboard: str | None = None
    """URL of the Ray dashboard of its cluster; RAY_API_SERVER_ADDRESS or this machine's unless given."""
    timeout_s: float = Field(default=120.0, gt=0.0)
    """Seconds in which all replicas have to follow."""


class PromoteConfig(ServiceAddress):
    """Swap a model's weights in place; `python -m jobs.serve promote CHECKPOINT [model=NAME]`."""

    checkpoint: str
    """RUN or RUN@STEP below the service's root."""
    model: str | None = None
    """The model whose weights change; may be left out where the service has only one."""


class RollbackConfig(ServiceAddress):
    """Take the last promotion of a model back; `python -m jobs.serve rollback [model=NAME]`."""

    model: str | None = None
    """The model whose weights go back; may be left out where the service has only one."""


class KeyMakingConfig(Section):
    """Make a bearer token and say what to put into the configuration; `python -m jobs.serve key NAME`."""

    name: str = Field(min_length=1)
    """Whose token it is."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests a minute that it is good for; none for no limit."""


class SealConfig(Section):
    """Write the manifest of a run that was saved before there were any; `python -m jobs.serve seal RUN`."""

    run: RunUri
    """URI of a finished run."""

"""What every route of the gateway needs."""

from dataclasses import dataclass

from actors.serving.admission import Admission
from actors.serving.backend import Backend
from actors.serving.config import ServiceConfig
from actors.serving.keys import Keyring
from actors.serving.meters import Meters


@dataclass(frozen=True)
class Door:
    """The gateway's parts, made once by `app.create_app`."""

    backend: Backend
    config: ServiceConfig
    meters: Meters
    """Prometheus metrics."""
    keyring: Keyring
    """Who may come in, how often."""
    admission: Admission
    """How many may be inside."""

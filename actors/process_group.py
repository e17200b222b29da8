"""The process group of Ray Train's workers: NCCL where torch finds the GPUs that Ray reserved, else gloo."""

import os
from dataclasses import dataclass, replace
from typing import Any

import psutil
import ray
import torch
from ray.train.torch import TorchConfig, get_device


@dataclass
class ProcessGroupConfig(TorchConfig):
    """`TorchConfig` that takes gloo where a worker has no GPU, though one was reserved for it.

    Ray Train takes NCCL as soon as GPUs are asked for, which fails on logical ones (`num_gpus` of a node
    without any).
    """

    @property
    def backend_cls(self) -> Any:
        """The backend class that Ray Train's controller makes."""
        parent: Any = super().backend_cls

        class Backend(parent):
            """Sets up and asks the workers before it starts their group."""

            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                worker_group.execute(use_node_interface)
                chosen = backend_config.backend
                if chosen == "nccl" and not all(worker_group.execute(torch.cuda.is_available)):
                    backend_config = replace(backend_config, backend="gloo")
                super().on_start(worker_group, backend_config)

        return Backend


def use_node_interface() -> None:
    """Make gloo and NCCL of this process use the interface that Ray's address of the node is on.

    Left alone, gloo takes the address of the host's name, which on many systems is a loopback one that no
    other machine reaches. A choice that was made already stays.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            if name != "lo":
                os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def worker_device() -> torch.device:
    """Return the device of this Ray Train worker; the CPU where Ray's GPUs are only logical."""
    return get_device() if torch.cuda.is_available() else torch.device("cpu")

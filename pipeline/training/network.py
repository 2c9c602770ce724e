"""The network interface that ranks talk through: the one that Ray reaches this node by.

Left alone, gloo takes the address of the host's name, which on many hosts is loopback or an inner network: ranks on one
node then find each other, and those of several do not. NCCL takes the first interface that is up. Ray's address of the
node is one that the other nodes are known to reach. Used by `stopping.InterruptibleTorch` before the process group is
made; what the user has set in the environment stays.
"""

import os
import socket
from collections.abc import Mapping, Sequence

import psutil
import ray

from pipeline.logs import get_logger

log = get_logger("network")


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME of this process, unless they are set.

    Nothing is set where no interface has Ray's address, as behind address translation: both then choose for themselves.
    """
    address = ray.util.get_node_ip_address()
    name = interface_of(address, addresses())
    if name is None:
        log.info("no interface has this node's address %s; set GLOO_SOCKET_IFNAME if ranks do not meet", address)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not address.startswith("127."):  # a Ray of this machine alone; NCCL has better ways there
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": this one, not all whose names begin so


def interface_of(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The name of the first interface that has `address`, or None."""
    return next((name for name, own in interfaces.items() if address in own), None)


def addresses() -> dict[str, list[str]]:
    """IP addresses of each interface of this host, without the zone that link-local ones carry."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }

"""Choice of the network interface that ranks talk through: the one with the node's address in Ray.

By default gloo uses the address of the host name. On many hosts that is loopback or an internal network, so ranks on
different nodes cannot connect. NCCL uses the first interface that is up. The node's address in Ray is known to be
reachable. The choice must come before the process group is created; variables that the user has set are kept.
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

    If no interface has Ray's address, as behind address translation, nothing is set and both libraries choose.
    """
    address = ray.util.get_node_ip_address()
    name = find_interface(address, list_addresses())
    if name is None:
        log.info("no interface has this node's address %s; if ranks cannot connect, set GLOO_SOCKET_IFNAME", address)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if not address.startswith("127."):  # loopback: Ray on one machine, where NCCL has faster transports
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # "=": the exact name, not a prefix


def find_interface(address: str, interfaces: Mapping[str, Sequence[str]]) -> str | None:
    """The name of the first interface that has `address`, or None."""
    return next((name for name, own in interfaces.items() if address in own), None)


def list_addresses() -> dict[str, list[str]]:
    """IP addresses of each interface of this host, without the zone suffix of link-local ones."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }

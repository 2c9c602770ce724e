"""Hosts of a local network on this machine: network namespaces, each with addresses, a name and files of its own.

None of them reaches, or is reached from, anything but the others. Needs root and `ip` (Debian: iproute2).
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

LAN, INNER = "10.213.77", "10.213.78"  # the network of all hosts, and one that each has for itself
# A host's name means its inner address, as it means loopback or a container bridge on many machines.
SETUP = """
hostname {name} && mount --bind {hosts} /etc/hosts && mount -t tmpfs none {private} && exec "$@"
"""


@dataclass
class Host:
    """One of them. `lan` is its interface of the network; `address` its address there."""

    number: int
    space: str
    folder: Path
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{LAN}.{self.number}"

    def start(self, command: list[str], log: Path, **environment: str) -> "subprocess.Popen[str]":
        """Run a command on it until the network is taken down."""
        name = f"host{self.number}"
        hosts = self.folder / name
        hosts.write_text(f"127.0.0.1 localhost\n{INNER}.{self.number} {name}\n")
        setup = SETUP.format(name=name, hosts=hosts, private=self.folder / "private")
        line = ["ip", "netns", "exec", self.space, "unshare", "--uts", "sh", "-c", setup, "sh", *command]
        with log.open("w") as file:
            process = subprocess.Popen(line, stdout=file, stderr=file, text=True, env={**os.environ, **environment})
        self.processes.append(process)
        return process

    def received(self, interface: str) -> int:
        """Bytes that came in through an interface so far."""
        path = f"/sys/class/net/{interface}/statistics/rx_bytes"
        return int(subprocess.check_output(["ip", "netns", "exec", self.space, "cat", path], text=True))


@contextmanager
def local_network(hosts: int, folder: Path) -> Iterator[list[Host]]:
    """Namespaces joined by a bridge, which is in the first; `folder` is shared, all but `folder/private`."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed (apt-get install iproute2 util-linux)")
    (folder / "private").mkdir()
    made = [Host(number + 1, f"lan{os.getpid()}-{number + 1}", folder) for number in range(hosts)]
    try:
        try:
            for host in made:
                _ip("netns", "add", host.space)
                _ip("-n", host.space, "link", "set", "lo", "up")
            _ip("-n", made[0].space, "link", "add", "lan", "type", "bridge")
            for host in made:
                _connect(host, made[0].space)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel does not let us make networks: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield made
    finally:
        for host in made:
            for process in host.processes:
                _end(process)
            subprocess.run(["ip", "netns", "del", host.space], capture_output=True, check=False)


def _connect(host: Host, bridge_space: str) -> None:
    inside, port = ["-n", host.space], f"port{host.number}"
    if host.space != bridge_space:
        _ip(*inside, "link", "add", "lan", "type", "veth", "peer", "name", port, "netns", bridge_space)
        _ip("-n", bridge_space, "link", "set", port, "master", "lan", "up")
    _ip(*inside, "link", "add", "inner", "type", "veth", "peer", "name", "nowhere")
    for interface, address in (("lan", host.address), ("inner", f"{INNER}.{host.number}")):
        _ip(*inside, "addr", "add", f"{address}/{24 if interface == 'lan' else 32}", "dev", interface)
        _ip(*inside, "link", "set", interface, "up")
    _ip(*inside, "link", "set", "nowhere", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
    process.wait(timeout=60)

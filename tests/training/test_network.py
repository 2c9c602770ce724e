"""Which interface ranks talk through, on made-up hosts and on this one."""

import os

import pytest

from pipeline.training import network
from pipeline.training.network import addresses, choose_interface, interface_of

HOST = {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "eth1": ["10.0.0.7", "fe80::1"], "eth10": ["10.1.0.7"]}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(network, "addresses", lambda: HOST)
    return monkeypatch


def chosen(host: pytest.MonkeyPatch, address: str) -> tuple[str | None, str | None]:
    host.setattr(network.ray.util, "get_node_ip_address", lambda: address)
    choose_interface()
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_the_interface_with_rays_address(host: pytest.MonkeyPatch) -> None:
    """NCCL takes every interface whose name begins as it is told, so "eth1" would mean eth10 as well."""
    assert chosen(host, "10.0.0.7") == ("eth1", "=eth1")


def test_one_machine_alone(host: pytest.MonkeyPatch) -> None:
    assert chosen(host, "127.0.0.1") == ("lo", None)


def test_an_address_that_is_translated_chooses_nothing(host: pytest.MonkeyPatch) -> None:
    assert chosen(host, "203.0.113.9") == (None, None)


def test_what_the_user_has_set_stays(host: pytest.MonkeyPatch) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", "ib0")
    host.setenv("NCCL_SOCKET_IFNAME", "ib")
    assert chosen(host, "10.1.0.7") == ("ib0", "ib")


def test_this_host_has_loopback() -> None:
    assert (interface_of("127.0.0.1", addresses()) or "").startswith("lo")
    assert interface_of("192.0.2.99", HOST) is None

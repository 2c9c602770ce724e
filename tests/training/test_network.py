"""The choice of the network interface, on fake hosts and on this one."""

import os

import pytest

from pipeline.training import network
from pipeline.training.network import choose_interface, find_interface, list_addresses

HOST = {"lo": ["127.0.0.1", "::1"], "docker0": ["172.17.0.1"], "eth1": ["10.0.0.7", "fe80::1"], "eth10": ["10.1.0.7"]}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(network, "list_addresses", lambda: HOST)
    return monkeypatch


def chosen(host: pytest.MonkeyPatch, address: str) -> tuple[str | None, str | None]:
    host.setattr(network.ray.util, "get_node_ip_address", lambda: address)
    choose_interface()
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_choose_interface_takes_the_one_with_rays_address(host: pytest.MonkeyPatch) -> None:
    """Without "=" NCCL takes the name as a prefix, so "eth1" would also mean eth10."""
    assert chosen(host, "10.0.0.7") == ("eth1", "=eth1")


def test_choose_interface_loopback_leaves_nccl_alone(host: pytest.MonkeyPatch) -> None:
    assert chosen(host, "127.0.0.1") == ("lo", None)


def test_choose_interface_translated_address_sets_nothing(host: pytest.MonkeyPatch) -> None:
    assert chosen(host, "203.0.113.9") == (None, None)


def test_choose_interface_keeps_the_users_settings(host: pytest.MonkeyPatch) -> None:
    host.setenv("GLOO_SOCKET_IFNAME", "ib0")
    host.setenv("NCCL_SOCKET_IFNAME", "ib")
    assert chosen(host, "10.1.0.7") == ("ib0", "ib")


def test_list_addresses_has_loopback() -> None:
    assert (find_interface("127.0.0.1", list_addresses()) or "").startswith("lo")
    assert find_interface("192.0.2.99", HOST) is None

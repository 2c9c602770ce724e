"""Preparation of nodes before a run starts, on a fake cluster."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RaySystemError, RayTaskError, TaskUnschedulableError

from pipeline.config import DataConfig, ScalingConfig
from pipeline.errors import ConfigError, OpError, RunError
from pipeline.launch import nodes
from pipeline.launch.nodes import holds_a_worker, prepare_node, prepare_nodes
from pipeline.launch.ray_internals import HEAD_RESOURCE


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of building: for which devices."""
    devices: list[str] = []
    monkeypatch.setattr(nodes, "build", devices.append)
    return devices


def test_prepare_node_unseen_storage_raises(tmp_path: Path, built: list[str]) -> None:
    with pytest.raises(RunError, match=f"storage {tmp_path}/runs "):
        prepare_node("cpu", f"{tmp_path}/runs/.probe_1")
    with pytest.raises(RunError, match=f"storage local://{tmp_path}/runs "):
        prepare_node("cpu", f"local://{tmp_path}/runs/.probe_1")
    assert built == []


def test_prepare_node_foreign_cache_folder_raises(tmp_path: Path, built: list[str]) -> None:
    (tmp_path / "probe").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        prepare_node("cpu", str(tmp_path / "probe"), str(tmp_path))
    assert built == []
    prepare_node("cpu", str(tmp_path / "probe"), str(tmp_path / "cache"))
    assert (tmp_path / "cache").is_dir()


@pytest.mark.parametrize(
    ("folder", "gib", "expected"),
    [("s3://b/x", 10.0, True), ("s3://b/x", 0.0, False), ("/data", 10.0, False), ("file:///data", 10.0, False)],
)
def test_prepare_nodes_creates_cache_for_remote_shards_only(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch, folder: str, gib: float, expected: bool
) -> None:
    monkeypatch.setattr(nodes, "ray", OneNode({"CPU": 2.0}))
    data = DataConfig(train=folder, val="/val", cache_dir=str(tmp_path / "cache"), cache_gib=gib)
    prepare_nodes(ScalingConfig(use_gpu=False), str(tmp_path / "runs"), data)
    assert (tmp_path / "cache").is_dir() == expected


class OneNode:
    """The part of Ray that `prepare_nodes` uses, with one node: this one."""

    def __init__(self, resources: dict[str, float]) -> None:
        self._nodes = [{"NodeID": "a" * 56, "Alive": True, "Resources": resources, "NodeManagerAddress": "127.0.0.1"}]

    def get_runtime_context(self) -> Any:
        return self

    def get_node_id(self) -> str:
        return "a" * 56

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def remote(self, **options: Any) -> Any:
        return lambda function: function


@pytest.mark.parametrize(("gpus", "use_gpu", "expected"), [(0, False, ["cpu"]), (1, True, ["cuda"]), (0, True, [])])
def test_prepare_nodes_prepares_drivers_node_if_it_can_hold_a_worker(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch, gpus: int, use_gpu: bool, expected: list[str]
) -> None:
    monkeypatch.setattr(nodes, "ray", OneNode({"CPU": 2.0, "GPU": float(gpus)}))
    prepare_nodes(ScalingConfig(use_gpu=use_gpu), str(tmp_path / "runs"))
    assert built == expected
    assert list((tmp_path / "runs").iterdir()) == []  # the probe is gone


class LostNode(OneNode):
    """Another node, which is dead although Ray lists it as alive."""

    def nodes(self) -> list[dict[str, Any]]:
        return [*super().nodes(), {**super().nodes()[0], "NodeID": "bb" * 28, "NodeManagerAddress": "192.0.2.9"}]

    def remote(self, *arguments: Any, **options: Any) -> Any:
        return "reference" if arguments else lambda function: self

    def options(self, **options: Any) -> Any:
        return self

    def get(self, reference: str) -> None:
        raise TaskUnschedulableError("the node doesn't exist any more")


def test_prepare_nodes_lost_node_is_skipped(
    tmp_path: Path, built: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes, "ray", LostNode({"CPU": 2.0}))
    prepare_nodes(ScalingConfig(use_gpu=False), str(tmp_path))
    assert built == ["cpu"]
    assert "node 192.0.2.9 is gone" in caplog.text


class FailingNode(OneNode):
    """The node is another one, and its task ends with an error."""

    def __init__(self, error: Exception) -> None:
        super().__init__({"CPU": 2.0})
        self._error = error

    def get_node_id(self) -> str:
        return "b" * 56

    def remote(self, **options: Any) -> Any:
        return lambda function: self

    def options(self, **options: Any) -> Any:
        return SimpleNamespace(remote=lambda *arguments: arguments)

    def get(self, reference: Any) -> Any:
        raise self._error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RayTaskError("f", "trace", OpError("no compiler")), OpError, r"^node 127\.0\.0\.1: no compiler$"),
        (
            RayTaskError("f", "trace", ModuleNotFoundError("No module named 'pipeline'")),
            RunError,
            r"node 127\.0\.0\.1 .*constraints\.txt",
        ),
        (RaySystemError("its raylet died"), RunError, r"node.*its raylet died"),
    ],
)
def test_prepare_nodes_failing_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], said: str
) -> None:
    monkeypatch.setattr(nodes, "ray", FailingNode(error))
    with pytest.raises(kind, match=said):
        prepare_nodes(ScalingConfig(use_gpu=False), str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_prepare_nodes_unwritable_storage_raises(tmp_path: Path, built: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"storage .*file/runs"):
        prepare_nodes(ScalingConfig(use_gpu=False), str(tmp_path / "file" / "runs"))
    assert built == []


def test_holds_a_worker_compares_one_node() -> None:
    two_cpus = ScalingConfig(cpus_per_worker=2, use_gpu=False)
    assert holds_a_worker({"CPU": 2.0}, two_cpus)
    assert not holds_a_worker({"CPU": 1.5}, two_cpus)
    assert not holds_a_worker({"CPU": 0.0, "GPU": 0.0, HEAD_RESOURCE: 1.0}, two_cpus)
    assert not holds_a_worker({"CPU": 4.0}, ScalingConfig(cpus_per_worker=2, use_gpu=True))

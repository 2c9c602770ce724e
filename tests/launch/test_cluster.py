"""Requested resources against those of a cluster, without Ray."""

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import EvaluationConfig, ScalingConfig
from pipeline.errors import ResourceError
from pipeline.launch import cluster


@pytest.fixture
def having(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def have(*answers: dict[str, float]) -> None:
        """The cluster answers with each of these in turn, then with the last one."""
        left = list(answers)
        monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: left.pop(0) if len(left) > 1 else left[0])
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": answers[-1]}])

    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.0)
    return have


def test_check_resources_exact_fit_passes(having: Callable[..., None]) -> None:
    having({"CPU": 4.0, "GPU": 2.0})
    cluster.check_resources(ScalingConfig(num_workers=2, cpus_per_worker=2, use_gpu=True))


@pytest.mark.parametrize(
    ("scaling", "numbers"),
    [
        (ScalingConfig(num_workers=5), r"\b5 CPUs\b.*\b4\b"),
        (ScalingConfig(num_workers=2, cpus_per_worker=2.5), r"\b5 CPUs\b.*\b4\b"),
        (ScalingConfig(num_workers=3, use_gpu=True), r"\b3 GPUs\b.*\b2\b"),
    ],
)
def test_check_resources_too_few_raises_with_both_numbers(
    having: Callable[..., None], scaling: ScalingConfig, numbers: str
) -> None:
    having({"CPU": 4.0, "GPU": 2.0})
    with pytest.raises(ResourceError, match=numbers):
        cluster.check_resources(scaling)


def test_check_resources_worker_larger_than_a_node_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of three CPUs have nine, but hold only three workers of two."""
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}] * 3 + [{"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 9.0})
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    cluster.check_resources(ScalingConfig(num_workers=3, cpus_per_worker=2))
    with pytest.raises(ResourceError, match=r"num_workers=4 of 2 CPUs\b.*\b3 nodes\b.*\b3\b"):
        cluster.check_resources(ScalingConfig(num_workers=4, cpus_per_worker=2))


def test_check_resources_elastic_run_needs_min_workers(having: Callable[..., None]) -> None:
    having({"CPU": 4.0, "GPU": 2.0})
    cluster.check_resources(ScalingConfig(num_workers=64, min_workers=4))
    with pytest.raises(ResourceError, match=r"scaling\.min_workers=5 .*\b5 CPUs\b.*\b4\b"):
        cluster.check_resources(ScalingConfig(num_workers=64, min_workers=5))
    assert cluster.resolve_gpu(ScalingConfig(num_workers=64, min_workers=2)).use_gpu is True
    assert cluster.resolve_gpu(ScalingConfig(num_workers=64, min_workers=3)).use_gpu is False
    with pytest.raises(ValueError, match=r"min_workers 3 .*num_workers 2"):
        ScalingConfig(num_workers=2, min_workers=3)


def test_check_resources_growing_cluster_is_awaited(
    having: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    having({"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 8.0})
    asked: list[ScalingConfig] = []
    monkeypatch.setattr(cluster, "_ask_autoscaler", asked.append)
    cluster.check_resources(ScalingConfig(num_workers=8, wait_minutes=1))
    assert len(asked) == 2


@pytest.mark.parametrize(("gpus", "workers", "used"), [(0, 1, False), (1, 1, True), (1, 2, False)])
def test_resolve_gpu_auto_needs_one_for_each_worker(
    having: Callable[..., None], gpus: int, workers: int, used: bool
) -> None:
    having({"CPU": 8.0, "GPU": float(gpus)})
    assert cluster.resolve_gpu(ScalingConfig(num_workers=workers)).use_gpu is used
    assert cluster.resolve_gpu(ScalingConfig(num_workers=workers, use_gpu=True)).use_gpu is True


@pytest.mark.parametrize(
    ("nodes", "free", "workers", "spare"),
    [
        ([{"CPU": 4.0}], {"CPU": 4.0}, 3, True),
        ([{"CPU": 4.0}], {"CPU": 4.0}, 4, False),
        ([{"CPU": 4.0}], {"CPU": 3.0}, 3, False),  # somebody else has it
        ([{"CPU": 1.5}, {"CPU": 1.5}], {"CPU": 3.0}, 2, False),  # halves on two nodes hold nothing
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 8.0, "GPU": 2.0}, 2, False),
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 8.0, "GPU": 2.0}, 1, True),
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 8.0, "GPU": 1.0}, 1, False),
        ([{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}], {"CPU": 16.0, "GPU": 1.0}, 1, False),
    ],
)
def test_resolve_where_auto_needs_a_spare_slot(
    nodes: list[dict[str, float]],
    free: dict[str, float],
    workers: int,
    spare: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: free)
    scaling = ScalingConfig(num_workers=workers, use_gpu="GPU" in nodes[0])
    assert cluster.resolve_where(EvaluationConfig(), scaling).where == ("tasks" if spare else "inline")
    assert len(caplog.records) == 1
    caplog.clear()
    for given in ("inline", "tasks"):
        assert cluster.resolve_where(EvaluationConfig(where=given), scaling).where == given
    warned = [record.levelname for record in caplog.records]
    assert warned == ([] if spare else ["WARNING"])  # of tasks that will have to wait


def test_start_ray_dead_address_raises_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray would try for two minutes"))
    began = time.monotonic()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for scheme in ("", "ray://"):
            monkeypatch.setenv("RAY_ADDRESS", scheme + address)  # nobody listens
            with pytest.raises(ResourceError, match=f"RAY_ADDRESS={scheme}{address}"):
                cluster.start_ray()
        other.listen()  # it takes connections, but is no Ray
        with pytest.raises(ResourceError, match="RAY_ADDRESS"):
            cluster.start_ray()
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ResourceError, match="ray job submit"):
        cluster.start_ray()
    assert time.monotonic() - began < 20


def test_start_ray_long_tmpdir_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 25)))
    with pytest.raises(ResourceError, match="RAY_TMPDIR"):
        cluster.start_ray()

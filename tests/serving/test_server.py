"""`run_server` on a cluster whose Ray and Ray Serve are played: what is refused, and what it leaves at its end."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from pipeline.config.serving import ServingConfig
from pipeline.errors import ResourceError, ServingError
from pipeline.launch import cluster, ray_internals
from pipeline.serving import server
from pipeline.serving.arguments import TOKEN, Arguments


@dataclass
class Cluster:
    """A cluster with so many CPUs, and its Ray Serve."""

    cpus: float = 8.0
    options: Any = None  # of Ray Serve; None if it does not run
    applications: list[str] = field(default_factory=list)
    lives: bool = True
    calls: list[str] = field(default_factory=list)

    def deploy(self, arguments: Arguments) -> None:
        self.calls.append("deploy")
        self.options = self.options or listening()
        self.applications.append(server.NAME)

    def delete(self, name: str) -> None:
        if not self.lives:
            raise RayServeException("no controller")
        self.calls.append("delete")
        self.applications.remove(name)

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def listening(**changes: Any) -> Any:
    """Options of a Ray Serve as `jobs.serve` would start it."""
    return SimpleNamespace(**{"host": "127.0.0.1", "port": 8000, "root_path": "", "request_timeout_s": None, **changes})


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A cluster where a server ends as soon as it is there."""
    played = Cluster()
    monkeypatch.delenv(TOKEN, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setattr(cluster, "start_ray", lambda: None)
    monkeypatch.setattr(cluster, "resolve_gpu", lambda scaling: scaling.model_copy(update={"use_gpu": False}))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": played.cpus}}])
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: played.calls.append("leave Ray") if not played.lives else None)
    monkeypatch.setattr(ray_internals, "running_serve_options", lambda: played.options)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=dict.fromkeys(played.applications)))
    monkeypatch.setattr(serve, "delete", played.delete)
    monkeypatch.setattr(serve, "shutdown", played.shutdown)
    monkeypatch.setattr(server, "_deploy", played.deploy)

    def end() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_check_status", end)
    monkeypatch.setattr(server, "POLL_SECONDS", 0.0)
    return played


def run(**settings: Any) -> None:
    arguments = Arguments(model="models:/mine/1", needs_token=False, settings=ServingConfig(**settings))
    with pytest.raises(KeyboardInterrupt):
        server.run_server(arguments)


def test_run_server_on_a_cluster_leaves_the_applications_of_others(played: Cluster) -> None:
    played.options, played.applications = listening(port=8100), ["detector"]
    with pytest.raises(ServingError, match=r"detector already, at http://127\.0\.0\.1:8100: .*serve shutdown"):
        run()
    assert played.calls == []


def test_run_server_on_a_cluster_that_is_too_small_is_refused(played: Cluster) -> None:
    played.cpus = 0.5
    with pytest.raises(ResourceError, match="--replicas"):
        run()
    assert played.calls == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"port": 8100}, r"http://127\.0\.0\.1:8100, .*serve shutdown.*--host 127\.0\.0\.1 --port 8100$"),
        ({"host": "0.0.0.0"}, r"http://0\.0\.0\.0:8000, .*--host 0\.0\.0\.0 --port 8000$"),
        ({"host": "::"}, r"http://\[::\]:8000, .*--host :: --port 8000$"),
        ({"root_path": "/models"}, r"http://127\.0\.0\.1:8000/models, .*serve shutdown\)$"),
        ({"host": None}, r"no address.*serve shutdown\)$"),
    ],
)
def test_run_server_another_address_than_that_of_ray_serve_is_refused(
    played: Cluster, changes: dict[str, Any], named: str
) -> None:
    """Ray Serve itself ignores --host and --port with a line in its log."""
    played.options = listening(**changes)
    with pytest.raises(ServingError, match=named):
        run()
    assert played.calls == []


def test_run_server_the_address_of_ray_serve_is_used_and_ray_serve_stays(
    played: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    played.options = listening(host="::1", port=8100, request_timeout_s=20.0)
    run(host="::1", port=8100, timeout_s=30)
    assert played.calls == ["deploy", "delete"]
    assert "ends a request after 20 s, which --timeout-s cannot change" in caplog.text


def test_run_server_ends_the_ray_serve_that_it_has_started(played: Cluster) -> None:
    """Else the next start could not choose another address."""
    run()
    assert played.calls == ["deploy", "delete", "shutdown"]


def test_run_server_leaves_a_ray_serve_that_others_use_meanwhile(
    played: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deploy_two(arguments: Arguments) -> None:
        played.deploy(arguments)
        played.applications.append("other")

    monkeypatch.setattr(server, "_deploy", deploy_two)
    run()
    assert played.calls == ["deploy", "delete"]


def test_run_server_on_a_cluster_that_has_ended_says_that(
    played: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not that its application cannot be deleted."""

    def end() -> None:
        played.lives = False
        raise ServingError("Ray has ended")

    monkeypatch.setattr(server, "_check_status", end)
    with pytest.raises(ServingError, match="Ray has ended"):
        server.run_server(Arguments(model="models:/mine/1", needs_token=False))
    assert played.calls == ["deploy", "leave Ray"]
    assert "cannot end Ray Serve: no controller" in caplog.text

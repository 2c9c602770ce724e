"""Shared by all tests: keep Ray, MLflow and the threads of two cores quiet."""

import os
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they give
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_worker_niceness", "0")  # beside other tests its workers would crawl
os.environ.pop("MLFLOW_TRACKING_URI", None)  # tests say where their store is

# Examples are slow beside other tests: no deadline, and no check of how long it takes to draw them. The same ones in
# each run, so that a change is never refused for a fault that it did not make; `make test-all` and the weekly workflow
# look for new ones.
settings.register_profile("same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("new", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


STARTS_RAY = ("tests/integration/", "tests/data/sharding/test_parallel.py", "tests/test_wheel.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start a Ray come first: under pytest-xdist they are the longest part, which one process has."""
    for item in items:
        assert item.get_closest_marker("ray") is None or item.nodeid.startswith(STARTS_RAY), f"add {item.nodeid}"
    items.sort(key=lambda item: not item.nodeid.startswith(STARTS_RAY))


def pytest_runtest_teardown() -> None:
    """Forget where MLflow found the code of a registered version: processes of later tests would run that copy."""
    sys.path[:] = [folder for folder in sys.path if "/artifacts/code" not in folder]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, and so do all that start a Ray: two at once would starve each other.

    Its own `--dist loadgroup` would do, but under pytest 9.2 pytest-xdist 3.8 does not see the groups.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(STARTS_RAY) else nodeid.partition("::")[0]

        def remove_node(self, node: Any) -> str | None:
            """Hand out the files that a dead process has left, and return the test that it died in.

            pytest-xdist 3.8 also hands out finished files, whose end nobody reports, so the run would never end; and
            the test itself, which would end the next process.
            """
            left = {scope: tests for scope, tests in self.assigned_work.pop(node).items() if not all(tests.values())}
            died = next((test for tests in left.values() for test, done in tests.items() if not done), None)
            if died is None:
                return None
            left[self._split_scope(died)][died] = True
            self.workqueue.update({scope: tests for scope, tests in left.items() if not all(tests.values())})
            for other in self.assigned_work:
                self._reschedule(other)
            return died

        def schedule(self) -> None:
            """Also let a process that replaces a dead one begin: it keeps its last test until more or the end comes."""
            super().schedule()
            for node in self.nodes:
                self._reschedule(node)

    return ByFile(config, log)

"""Shared by all tests: keep Ray, MLflow and the threads of two cores quiet."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads cost more than they give
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_worker_niceness", "0")  # beside other tests its workers would crawl
os.environ.pop("MLFLOW_TRACKING_URI", None)  # tests say where their store is

settings.register_profile("project", deadline=None)  # examples are slow beside other tests
settings.load_profile("project")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook, too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist the tests of a file stay together, and one process has all tests that start a Ray.

    Those are the longest part, so they begin first; the other processes have the rest.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        group = "ray" if item.get_closest_marker("ray") else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))

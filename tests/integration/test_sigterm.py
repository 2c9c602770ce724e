"""A process that runs Ray and gets SIGTERM ends as it wants to."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray
RUN = """
from pipeline.launch.cluster import start_ray
start_ray()
"""
WORKERS = """
from pipeline.data.sharding import parallel
results = parallel.run(os.path.basename, ["a", "b", "c"], workers=2)
next(results)
"""
PROGRAM = """
import os, signal, sys, time
{start}
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
except SystemExit:
    time.sleep(4)  # as closing a sweep may take
    sys.exit(75)
"""


@pytest.mark.parametrize("start", [RUN, WORKERS], ids=["run", "workers"])
def test_process_that_ray_connects_has_the_time_it_needs_after_sigterm(start: str) -> None:
    """Ray's own handler would abort it after three seconds."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(start=start)], capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 75, ended.stderr
    assert "SIGTERM received" not in ended.stderr

"""Runs one function over many inputs, in this process or as Ray tasks.

One worker does not import Ray. With more, `RAY_ADDRESS` gives the cluster, or a local one is started and stopped again.
More workers than CPUs are a ResourceError. An error of the function is raised unchanged.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.errors import PipelineError, ResourceError, after_start
from pipeline.signals import handle_sigterm_in_python

CANCEL_SECONDS = 10.0  # timeout for cancelled tasks to end

T = TypeVar("T")
R = TypeVar("R")


def run(function: Callable[[T], R], inputs: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    """Yield (position, result) in order of completion, with at most `workers` tasks at the same time."""
    if workers < 1:
        raise ResourceError(f"--workers must be at least 1, not {workers}")
    if workers == 1:
        for position, item in enumerate(inputs):
            with after_start():
                result = function(item)
            yield position, result
    else:
        yield from _run_on_ray(function, inputs, workers)


def _run_on_ray(function: Callable[[T], R], inputs: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    import ray  # takes seconds, and one worker does not need it

    started = not ray.is_initialized()
    if started:
        _start(ray, workers)
    running: dict[Any, int] = {}
    try:
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if workers > cpus:
            raise ResourceError(f"--workers {workers} asks for more CPUs than the Ray cluster has: {cpus}")
        task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(function)
        waiting = list(enumerate(inputs))[::-1]
        while waiting or running:
            while waiting and len(running) < workers:
                position, item = waiting.pop()
                running[task.remote(item)] = position
            done, _ = ray.wait(list(running))
            for reference in done:
                position = running.pop(reference)  # Ray 2.60 aborts this process if a task is cancelled as it finishes
                with after_start():
                    result = _result(ray, reference)
                yield position, result
    finally:
        for reference in running:  # after an error or Ctrl-C no task may continue to write
            ray.cancel(reference, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=CANCEL_SECONDS)
        if started:
            ray.shutdown()


def _start(ray: Any, workers: int) -> None:
    where: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS")}
    if not where["address"]:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if workers > cpus:
            raise ResourceError(f"--workers {workers} asks for more CPUs than this machine has: {cpus}")
        where = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="warning", **where)
    handle_sigterm_in_python()


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, PipelineError):
            raise error.cause from None
        raise

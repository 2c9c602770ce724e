"""Means, throughput and step times of a log interval, and the progress line. Pure arithmetic; it never fails."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from pipeline.engine.step import StepResult

T = TypeVar("T")


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one optimizer step on this rank."""

    total: float  # since the end of the previous step, without evaluation and checkpoint
    wait: float  # the part of it spent waiting for data
    own: float  # data and forward passes: the part before the rank waits for other ranks


class Meter:
    """Collects step results and times; `flush` turns them into metrics and starts the next window."""

    def __init__(self, global_batch: int, step: int, total_steps: int) -> None:
        self._global_batch = global_batch
        self._step = step
        self._first = step
        self._total = total_steps
        self._begin = self._mark = time.monotonic()
        self._waited = 0.0  # since the mark, which is the end of the last step
        self._metrics: dict[str, float] = {}
        self._reset()

    def time_waits(self, items: Iterable[T]) -> Iterator[T]:
        """Pass `items` through and count the time spent waiting for them."""
        iterator = iter(items)
        while True:
            start = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            yield item

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keep the time of the code inside (evaluation, checkpoint) out of throughput and step times."""
        start = time.monotonic()
        yield
        self._window += time.monotonic() - start
        self._mark += time.monotonic() - start

    def add(self, result: StepResult) -> StepTimes:
        """Count one optimizer step; returns the seconds it took."""
        now = time.monotonic()
        times = StepTimes(now - self._mark, self._waited, self._waited + result.forward_seconds)
        self._mark, self._waited = now, 0.0
        self._step += 1
        self._results.append(result)
        self._times.append(times)
        return times

    def flush(self) -> dict[str, float]:
        """Over the steps since the last flush: means of losses and gradient norm, images/s, data wait, step times.

        `perf/own_s`, the mean of `StepTimes.own`, and `perf/memory_mib` are of this rank, as the step times are.
        """
        elapsed = time.monotonic() - self._window
        count = len(self._results)
        names = self._results[0].losses
        losses = {f"train/{name}": sum(r.losses[name] for r in self._results) / count for name in names}
        middle, high = np.percentile([times.total for times in self._times], [50, 95])
        self._metrics = {
            **losses,
            "train/grad_norm": sum(r.grad_norm for r in self._results) / count,
            "train/skipped_steps": float(sum(not r.applied for r in self._results)),
            "perf/images_per_s": count * self._global_batch / elapsed,
            "perf/data_wait_share": sum(times.wait for times in self._times) / elapsed,
            "perf/step_p50_s": float(middle),
            "perf/step_p95_s": float(high),
            "perf/own_s": sum(times.own for times in self._times) / count,
            "perf/memory_mib": _peak_memory_mib(),
        }
        self._reset()
        return dict(self._metrics)

    def line(self, epoch: int, epochs: int, ap: str) -> str:
        """One line of progress from the last flush; `epoch` counts from 0."""
        speed = (time.monotonic() - self._begin) / max(1, self._step - self._first)
        left = format_duration(speed * (self._total - self._step))
        return (
            f"epoch {epoch + 1}/{epochs}  step {self._step}/{self._total}  loss {self._metrics['train/loss']:.4f}  "
            f"AP {ap}  {self._metrics['perf/images_per_s']:.1f} images/s  eta {left}"
        )

    def _reset(self) -> None:
        self._results: list[StepResult] = []
        self._times: list[StepTimes] = []
        self._window = time.monotonic()


def format_duration(seconds: float) -> str:
    """`4:05` or `1:04:05`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _peak_memory_mib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

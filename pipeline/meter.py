"""Running means, throughput and the progress line between two log points; used by `worker.py`."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from pipeline.engine import StepResult

T = TypeVar("T")


class Meter:
    """Collects step results and times; `flush` turns them into metrics and starts the next window."""

    def __init__(self, global_batch: int, step: int, total_steps: int) -> None:
        self._global_batch = global_batch
        self._step = step
        self._first = step
        self._total = total_steps
        self._begin = time.monotonic()
        self._metrics: dict[str, float] = {}
        self._reset()

    def waits(self, items: Iterable[T]) -> Iterator[T]:
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
    def paused(self) -> Iterator[None]:
        """Keep what happens inside (evaluation, checkpoint) out of the throughput."""
        start = time.monotonic()
        yield
        self._window += time.monotonic() - start

    def add(self, result: StepResult) -> None:
        """Count one optimizer step."""
        self._step += 1
        self._results.append(result)

    def flush(self) -> dict[str, float]:
        """Means since the last flush: losses, gradient norm, images/s, share of time waiting for data, memory."""
        elapsed = time.monotonic() - self._window
        count = len(self._results)
        names = self._results[0].losses
        losses = {f"train/{name}": sum(r.losses[name] for r in self._results) / count for name in names}
        self._metrics = {
            **losses,
            "train/grad_norm": sum(r.grad_norm for r in self._results) / count,
            "train/skipped_steps": float(sum(not r.applied for r in self._results)),
            "perf/images_per_s": count * self._global_batch / elapsed,
            "perf/data_wait_share": self._waited / elapsed,
            "perf/memory_mib": _peak_memory_mib(),
        }
        self._reset()
        return dict(self._metrics)

    def line(self, epoch: int, ap: float | None) -> str:
        """One line of progress from the last flush."""
        speed = (time.monotonic() - self._begin) / max(1, self._step - self._first)
        minutes, seconds = divmod(int(speed * (self._total - self._step)), 60)
        known = "-" if ap is None else f"{ap:.4f}"
        return (
            f"epoch {epoch}  step {self._step}/{self._total}  loss {self._metrics['train/loss']:.4f}  AP {known}  "
            f"{self._metrics['perf/images_per_s']:.1f} images/s  eta {minutes}:{seconds:02d}"
        )

    def _reset(self) -> None:
        self._results: list[StepResult] = []
        self._waited = 0.0
        self._window = time.monotonic()


def _peak_memory_mib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

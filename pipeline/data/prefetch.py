"""Prefetching: a thread downloads the next shards of a rank into the node's cache while the rank trains.

It follows the plan's shards in the order of their first use, at most `ahead` of them beyond the current step. A shard
that another process is downloading is skipped, so the ranks of a node share the work. Prefetching only saves time: the
reader downloads what is missing, and raises if that fails. Shards that are no longer needed are released, which lets
the cache remove them when it needs room.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from pipeline.errors import PipelineError

RETRY_SECONDS = 0.5  # until shards that other processes were downloading are checked again


class Prefetcher:
    """Context manager for the thread; its end stops the thread after the current download.

    Args:
        fetch: downloads a shard, by number, into the cache; False if it must be tried again later.
        release: lets the cache remove a shard, by number.
        uses: (first step, last step, shard) by first use, see `plan.shard_uses`; if empty, no thread is started.
        ahead: shards to fetch before they are needed.
    """

    def __init__(
        self,
        fetch: Callable[[int], bool],
        release: Callable[[int], None],
        uses: Sequence[tuple[int, int, int]],
        ahead: int,
    ) -> None:
        self._fetch, self._release, self._ahead = fetch, release, ahead
        self._begins = [first for first, _, _ in uses]
        self._lasts = [last for _, last, _ in uses]
        self._shards = [shard for _, _, shard in uses]
        self._ends = sorted(((last, shard) for _, last, shard in uses), reverse=True)
        self._step = 0
        self._wake = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="shard-prefetch", daemon=True)

    def __enter__(self) -> Self:
        if self._shards:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._wake:
            self._ended = True
            self._wake.notify()

    def begin(self, step: int) -> None:
        """Report that step `step` has begun."""
        with self._wake:
            self._step = step
            self._wake.notify()

    def done(self, step: int) -> None:
        """Report that everything for step `step` has been read."""
        while self._ends and self._ends[-1][0] <= step:
            self._release(self._ends.pop()[1])

    def _work(self) -> None:
        waiting = list(range(len(self._shards)))
        while waiting and not self._ended:
            due = self._due(waiting)
            busy = [number for number in due if not self._ended and not self._try(number)]
            waiting = busy + waiting[len(due) :]
            with self._wake:
                if busy:
                    self._wake.wait(RETRY_SECONDS)
                elif waiting:
                    self._wake.wait_for(lambda: self._ended or bool(self._due(waiting)))  # noqa: B023  # ends here

    def _due(self, waiting: Sequence[int]) -> list[int]:
        """The waiting uses that are needed now or next."""
        begun = sum(step <= self._step for step in self._begins)
        return [number for number in waiting if number < begun + self._ahead]

    def _try(self, number: int) -> bool:
        if self._lasts[number] < self._step:  # this thread is late: the shard is no longer needed
            return True
        try:
            return self._fetch(self._shards[number])
        except PipelineError:  # the reader gets the same error and names the sample
            return True

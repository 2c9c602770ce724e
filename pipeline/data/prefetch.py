"""Bringing the shards that a rank needs next into the node's cache, while it trains on those of now.

A thread of the training process walks through the plan's shards in the order of their first use, at most `ahead` of
them beyond the step that is being made. What another process is downloading is left to it, so the ranks of a node share
the work. It only saves waiting: whatever it cannot get, the reader gets, and raises if that fails. Shards that have
served are given up, so that the cache has room for these; they stay as long as there is room for all.
"""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from pipeline.errors import PipelineError

PAUSE = 0.5  # seconds until shards that others were downloading are looked at again


class Prefetcher:
    """Prefetches as a context manager; leaving it ends the thread after the download in work.

    Args:
        fetch: brings a shard, by number, into the cache; False if that has to wait.
        give_up: tells the cache that a shard has served.
        uses: (first step, last step, shard) by first use, see `plan.uses`; without any there is no thread.
        ahead: shards to fetch before they are needed.
    """

    def __init__(
        self,
        fetch: Callable[[int], bool],
        give_up: Callable[[int], None],
        uses: Sequence[tuple[int, int, int]],
        ahead: int,
    ) -> None:
        self._fetch, self._give_up, self._ahead = fetch, give_up, ahead
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
        """Step `step` is being made."""
        with self._wake:
            self._step = step
            self._wake.notify()

    def done(self, step: int) -> None:
        """All that step `step` reads has been read."""
        while self._ends and self._ends[-1][0] <= step:
            self._give_up(self._ends.pop()[1])

    def _work(self) -> None:
        waiting = list(range(len(self._shards)))
        while waiting and not self._ended:
            due = self._due(waiting)
            busy = [number for number in due if not self._ended and not self._try(number)]
            waiting = busy + waiting[len(due) :]
            with self._wake:
                if busy:
                    self._wake.wait(PAUSE)
                elif waiting:
                    self._wake.wait_for(lambda: self._ended or bool(self._due(waiting)))  # noqa: B023  # ends here

    def _due(self, waiting: Sequence[int]) -> list[int]:
        """Of the numbered uses that are left, those that are needed now or next."""
        begun = sum(step <= self._step for step in self._begins)
        return [number for number in waiting if number < begun + self._ahead]

    def _try(self, number: int) -> bool:
        if self._lasts[number] < self._step:  # this thread came late: it has served, and may be gone again
            return True
        try:
            return self._fetch(self._shards[number])
        except PipelineError:  # the reader meets it too, and says which sample needs the shard
            return True

"""Progress of long work: a bar on a terminal, a plain line every few seconds elsewhere (logs, CI).

It writes to standard error only.
"""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

LINE_SECONDS = 5.0  # between plain lines


class Progress:
    """Count up to `total` as a context manager: `with Progress(n, "shards", "shard") as bar: bar.advance()`."""

    def __init__(self, total: int, label: str, unit: str, scale: int = 1, rate: bool = False) -> None:
        """`scale` counted items are one displayed `unit`: 2**20 for bytes that are shown as MiB.

        A bar always shows the units per second; `rate` adds them to plain lines, from the first `advance` on.
        """
        self._total, self._label, self._unit, self._done, self._scale = total // scale, label, unit, 0, scale
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=self._total, desc=label, unit=unit, leave=False) if terminal else None
        self._last_line = time.monotonic()
        self._rate = rate
        self._first: tuple[int, float] | None = None  # items and time of the first `advance`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1) -> None:
        """Count `count` more items."""
        self._done += count
        if self._first is None:
            self._first = (self._done, time.monotonic())
        done = self._done // self._scale
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            unit = self._unit if self._scale > 1 else f"{self._unit}s"
            print(f"{self._label}: {done:,} of {self._total:,} {unit}{self._speed(unit)}", file=sys.stderr, flush=True)

    def _speed(self, unit: str) -> str:
        first, since = self._first or (0, 0.0)
        seconds = self._last_line - since
        if not self._rate or self._done == first or seconds <= 0:
            return ""
        return f", {(self._done - first) / self._scale / seconds:.3g} {unit}/s"

"""Filter of worker output: messages are shown at the driver's terminal, tracebacks and noise are kept for a file.

Ray sends every line that a worker prints to a handler in the driver; this module puts a filter before Ray's own. If
tracebacks were hidden, the driver writes all lines into a file at the end of the run, and logs its name. A file that
cannot be written is a warning.
"""

import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.files.storage import join, write_bytes
from pipeline.launch.ray_internals import (
    AUTOSCALER_PID,
    BEFORE_TRACEBACK,
    Batch,
    OutputHandler,
    find_output_handler,
    is_death_report,
    is_noise,
    replace_output_handler,
)
from pipeline.logs import get_logger

log = get_logger("worker_output")
FILE = "workers.log"
KEPT_LINES = 20_000
# Lines of libraries that users cannot act on: DeepSpeed without a GPU, matplotlib's search for fonts.
LIBRARY_NOISE = re.compile(r"real_accelerator\.py|fontManager")
TRACEBACK = "Traceback (most recent call last):"
BETWEEN_TRACEBACKS = ("During handling of the above exception", "The above exception was the direct cause")


class WorkerOutput:
    """A handler of worker output.

    Args:
        show: gets Ray's batches without the hidden lines.
    """

    def __init__(self, show: OutputHandler) -> None:
        self.hid_faults = False  # whether a traceback or the report of a worker's death was hidden
        self._show = show
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._inside: set[tuple[Any, ...]] = set()  # processes in the middle of a traceback
        self._lock = threading.Lock()

    def __call__(self, batch: Batch) -> None:
        """Keep the lines of a batch, and show those that are neither noise nor part of a traceback."""
        with self._lock:
            source = (batch.get("ip"), batch.get("pid"), batch.get("is_err"))
            name = batch.get("actor_name") or batch.get("task_name") or ""
            lines = list(batch.get("lines", ()))
            if batch.get("pid") != AUTOSCALER_PID:  # it prints the free resources every few seconds
                self._kept.extend(f"({name} pid={source[1]}, ip={source[0]}) {line}" for line in lines)
            shown = [line for line in lines if not self._is_hidden(source, line)]
        if shown:
            self._show(batch | {"lines": shown})

    def write(self, folder: str) -> str:
        """Write the last lines of all processes into `folder` (path or URL); returns the path, empty on failure."""
        path = join(folder, FILE)
        with self._lock:
            text = "\n".join([*self._kept, ""])
        try:
            write_bytes(path, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            log.warning("cannot write %s: %s", path, error)
            return ""
        return path

    def _is_hidden(self, source: tuple[Any, ...], line: str) -> bool:
        if is_noise(line) or LIBRARY_NOISE.search(line):
            return True
        if line.strip() in (TRACEBACK, BEFORE_TRACEBACK):
            self._inside.add(source)
            self.hid_faults = True
            return True
        if is_death_report(line):  # the line about the restart says it
            self.hid_faults = True
            return True
        if line.startswith(BETWEEN_TRACEBACKS) or not line.strip():
            return True
        if source not in self._inside:
            return False
        if not line.startswith((" ", "\t")):  # the exception itself, which the driver reports
            self._inside.discard(source)
        return True


@contextmanager
def filter_output() -> Iterator[WorkerOutput]:
    """Inside the `with` block, worker output passes a WorkerOutput. Without a handler of Ray nothing changes."""
    own = find_output_handler()
    if own is None:
        yield WorkerOutput(lambda batch: None)
        return
    output = WorkerOutput(own)
    with replace_output_handler(output):
        yield output

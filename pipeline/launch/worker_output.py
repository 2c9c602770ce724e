"""What Ray's processes print, on its way to the driver's terminal: sentences are shown, tracebacks and noise are kept.

Ray 2.60 hands every line that a worker prints to handlers in the driver; this module puts one before Ray's own. Where
faults were hidden, the driver writes all that was printed into a file at the run's end, and names it.
"""

import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

from pipeline.files.storage import join, write_bytes
from pipeline.logs import get_logger

log = get_logger("worker_output")
FILE = "workers.log"
RAYS_HANDLER = "ray_print_logs"
KEPT_LINES = 20_000
# Lines that nobody can act on: Ray's C++ about its own actors, DeepSpeed without a GPU, fonts that are looked up.
NOISE = re.compile(r"PreemptionWatcher|real_accelerator\.py|fontManager|Failed to send resource request for")
# Ray's report of a worker that died, which the restart's line says.
DEATH = re.compile(
    r"^A worker died or was killed while executing|^Graceful shutdown of backend failed"
    r"|^\t(class_name|actor_id|pid|name|namespace|ip): |^The actor is dead because"
)
TRACEBACK = "Traceback (most recent call last):"
BEFORE_TRACEBACK = "Error in training function:"
BETWEEN_TRACEBACKS = ("During handling of the above exception", "The above exception was the direct cause")


class WorkerOutput:
    """A handler of worker lines.

    Args:
        show: gets Ray's batches of lines, without those that are hidden.
    """

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self.hid_faults = False  # a traceback, or a worker's death
        self._show = show
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._inside: set[tuple[Any, ...]] = set()  # processes in the middle of a traceback
        self._lock = threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> None:
        """Take a batch as Ray makes it: `lines` of one process, `pid`, `ip`, `is_err`, `actor_name`, `task_name`."""
        with self._lock:
            source = (batch.get("ip"), batch.get("pid"), batch.get("is_err"))
            name = batch.get("actor_name") or batch.get("task_name") or ""
            lines = list(batch.get("lines", ()))
            if batch.get("pid") != "autoscaler":  # it reports what is free every few seconds
                self._kept.extend(f"({name} pid={source[1]}, ip={source[0]}) {line}" for line in lines)
            shown = [line for line in lines if not self._is_hidden(source, line)]
        if shown:
            self._show(batch | {"lines": shown})

    def write(self, folder: str) -> str:
        """Write the last lines of all processes into `folder` (path or URL); its name, empty if that failed."""
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
        if NOISE.search(line):
            return True
        if line.strip() in (TRACEBACK, BEFORE_TRACEBACK):
            self._inside.add(source)
            self.hid_faults = True
            return True
        if DEATH.search(line):
            self.hid_faults = True
            return True
        if line.startswith(BETWEEN_TRACEBACKS) or not line.strip():
            return True
        if source not in self._inside:
            return False
        if not line.startswith((" ", "\t")):  # the exception itself, which the driver says
            self._inside.discard(source)
        return True


@contextmanager
def filtered_output() -> Iterator[WorkerOutput]:
    """Within it, what workers print passes a WorkerOutput; in a process that Ray sends no lines to, nothing changes."""
    rays: Mapping[str, Callable[[dict[str, Any]], None]] = dict(dispatcher.handlers)
    output = WorkerOutput(rays.get(RAYS_HANDLER, _drop))
    if RAYS_HANDLER not in rays:
        yield output
        return
    dispatcher.remove_handler(RAYS_HANDLER)
    dispatcher.add_handler(RAYS_HANDLER, output)  # under Ray's name: `ray.shutdown` removes it
    try:
        yield output
    finally:
        if any(handler is output for _, handler in dispatcher.handlers):
            dispatcher.remove_handler(RAYS_HANDLER)
            dispatcher.add_handler(RAYS_HANDLER, rays[RAYS_HANDLER])


def _drop(batch: dict[str, Any]) -> None:
    """No handler of Ray: nothing is shown."""

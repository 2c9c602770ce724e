"""`train.profile_steps`: torch's profiler over a few optimizer steps of rank 0, as a Chrome trace in the run's folder.

Set up by `observer.py`. Open the trace at chrome://tracing or ui.perfetto.dev. A trace that cannot be written is a
warning. Outside of the window nothing runs.
"""

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.files.scratch import scratch_folder
from pipeline.files.storage import join, write_bytes
from pipeline.logs import get_logger
from pipeline.tracking.logger import RunLogger

FOLDER = "profile"
MLFLOW_BYTES = 20 * 2**20  # larger traces stay in the run's folder alone

log = get_logger("profiling")


class Profiler:
    """Traces steps `window[0]` to `window[1]`, both included and counted from 1 over the whole run.

    Args:
        window: None traces nothing. A run that goes on from within it leaves it out.
        folder: the run's, path or URL.
        logger: takes the trace too, if it is small.
    """

    def __init__(self, window: tuple[int, int] | None, folder: str, logger: RunLogger) -> None:
        self._window = window
        self._folder = join(folder, FOLDER)
        self._logger = logger
        self._profile: profile | None = None

    def after(self, step: int) -> None:
        """So many steps are done: begin before the first of the window, end after its last."""
        if self._window is None:
            return
        first, last = self._window
        if step == first - 1:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, acc_events=True)
            self._profile.start()
        elif step >= last:
            self.close(step)

    def close(self, step: int) -> None:
        """End a trace that runs and store it; `step` was the last in it."""
        if self._profile is None or self._window is None:
            return
        running, self._profile = self._profile, None
        name = f"steps_{self._window[0]}-{step}.json.gz"
        try:
            running.stop()
            with scratch_folder("profile") as scratch:
                path = scratch / name
                running.export_chrome_trace(str(path))
                size = path.stat().st_size
                write_bytes(join(self._folder, name), path.read_bytes())
                if size <= MLFLOW_BYTES:
                    self._logger.artifact(path, FOLDER)
            log.info(
                "trace of %d steps: %s (%.1f MiB)", step - self._window[0] + 1, join(self._folder, name), size / 2**20
            )
        except Exception as error:  # the profiler's own errors are RuntimeErrors, each store has others
            log.warning("the trace of train.profile_steps cannot be written, training goes on: %r", error)

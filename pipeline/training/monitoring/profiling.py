"""`train.profile_steps`: torch's profiler over a few optimizer steps of rank 0, as a Chrome trace in the run's folder.

Open the trace at chrome://tracing or ui.perfetto.dev. A trace that cannot be written is a warning. Outside the window
the profiler does not run.
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
        window: first and last step; None traces nothing. A run that resumes inside the window does not trace.
        folder: the run's, path or URL.
        logger: gets the trace too, if it is small.
    """

    def __init__(self, window: tuple[int, int] | None, folder: str, logger: RunLogger) -> None:
        self._window = window
        self._folder = join(folder, FOLDER)
        self._logger = logger
        self._profile: profile | None = None

    def after(self, step: int) -> None:
        """Start or end the trace, given the number of finished steps."""
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
        """End a running trace and store it; `step` was its last step."""
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
        except Exception as error:  # the profiler raises RuntimeErrors, each store its own errors
            log.warning("the trace of train.profile_steps cannot be written, training continues: %r", error)

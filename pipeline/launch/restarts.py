"""The decision after workers failed: a restart, announced with its cause, or the end if another try cannot succeed.

Ray calls `RestartCallback` in its controller process, before it restarts the workers. A ControllerError ends the run.
"""

from typing import Any

from ray.train import ControllerError, UserCallback

from pipeline.errors import DiskFullError, InputError, MemoryFullError
from pipeline.launch.failures import describe_failure, find_cause


class RestartCallback(UserCallback):
    """Announces each restart with its cause.

    Args:
        control: handle of the ControlChannel, whose lines the driver prints.
        max_failures: restarts before Ray gives up; -1 = no limit.
    """

    def __init__(self, control: Any, max_failures: int) -> None:
        self._control = control
        self._max_failures = max_failures
        self._failures = 0
        self._stored = False  # whether a checkpoint was stored since this start of the driver

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray after each report."""
        self._stored = self._stored or checkpoint is not None

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray when workers failed.

        Raises:
            ControllerError: another try would fail again: disk or memory is full, or the input is wrong and nothing was
                stored since this start.
        """
        cause = find_cause(worker_exceptions.values())
        if isinstance(cause, DiskFullError | MemoryFullError) or (isinstance(cause, InputError) and not self._stored):
            raise ControllerError(cause)
        self._failures += 1
        if 0 <= self._max_failures < self._failures:
            return  # the driver reports why the run ended
        of = f" of {self._max_failures}" if self._max_failures >= 0 else ""
        self._control.post_progress.remote(
            f"restart {self._failures}{of}: {describe_failure(worker_exceptions)}", keep=True
        )

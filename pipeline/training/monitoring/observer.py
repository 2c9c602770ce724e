"""The observer of a rank's steps: feeds MLflow, step files, Ray's dashboard, the profiler and the progress line.

There is one per rank, called with each step. Metrics of a log interval are those of the whole run, so logging is a
collective. A fault of anything it writes to is a warning: it cannot stop training.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from pipeline.checkpoint import TrainState
from pipeline.config import Config
from pipeline.engine.step import StepResult
from pipeline.logs import get_logger
from pipeline.runs.evaluations import History
from pipeline.runtime import Runtime
from pipeline.tracking.logger import RunLogger
from pipeline.training.monitoring.gauges import Gauges
from pipeline.training.monitoring.meter import Meter
from pipeline.training.monitoring.profiling import Profiler
from pipeline.training.monitoring.steplog import StepLog
from pipeline.training.monitoring.stragglers import StragglerMonitor, find_straggler, gather_values

log = get_logger("observer")
T = TypeVar("T")


class Observer:
    """Observes one rank.

    Args:
        config: of the run.
        runtime: this rank.
        logger: the MLflow run; only rank 0 writes.
        folder: the run's, path or URL.
        state: the run's position at this start.
        total_steps: of the whole run.
        control: handle of the `stopping.ControlChannel`, which the driver reads; None without a driver.
    """

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        logger: RunLogger,
        folder: str,
        state: TrainState,
        total_steps: int,
        control: Any | None,
    ) -> None:
        self.images_per_s = 0.0  # of the last log interval
        self._runtime = runtime
        self._logger = logger
        self._control = control if runtime.is_main else None
        self._epochs = config.train.epochs
        self._meter = Meter(config.train.global_batch, state.global_step, total_steps)
        self._stragglers = StragglerMonitor()
        self._gauges = Gauges(config.name, runtime.rank)
        self._steps = StepLog(folder, state.epoch, state.global_step) if runtime.is_main else None
        self._profiler = Profiler(config.train.profile_steps if runtime.is_main else None, folder, logger)
        self._profiler.after(state.global_step)
        self._last = state.global_step
        self._last_logged: int | None = None  # epoch

    def time_waits(self, items: Iterable[T]) -> Iterator[T]:
        """Pass batches through and count the time spent waiting for them."""
        return self._meter.time_waits(items)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Keep the code inside (evaluation, checkpoint) out of step times."""
        with self._meter.pause():
            yield

    def step(self, result: StepResult, epoch: int, step: int, lr: float) -> None:
        """Record optimizer step `step`, counted from 1 over the whole run."""
        self._last = step
        times = self._meter.add(result)
        if self._steps is not None:
            seconds = {"seconds": times.total, "wait_s": times.wait, "forward_s": result.forward_seconds}
            values = {**result.losses, "grad_norm": result.grad_norm, "applied": result.applied, "lr": lr, **seconds}
            self._steps.add(epoch, step, values)
        self._profiler.after(step)

    def log(self, state: TrainState, epoch: int, rates: dict[str, float], history: History) -> None:
        """Log the interval since the last call: MLflow, gauges and progress line. A collective.

        Args:
            state: after the last step.
            epoch: of the last step, from 0.
            rates: learning rates by parameter group.
            history: the evaluations so far.
        """
        metrics = self._meter.flush()
        own, memory, middle = metrics.pop("perf/own_s"), metrics["perf/memory_mib"], metrics["perf/step_p50_s"]
        self.images_per_s = metrics["perf/images_per_s"]
        ranks = gather_values([own, memory], self._runtime)
        self._gauges.set({"step_seconds": middle, "own_seconds": own, "memory_mib": memory})
        if not self._runtime.is_main:
            return
        metrics["perf/memory_mib"] = max(memory for _, memory in ranks)
        straggler = find_straggler([own for own, _ in ranks])
        if straggler is not None:
            metrics |= {"perf/slowest_rank": float(straggler.rank), "perf/slowest_rank_lag_s": straggler.lag}
        self._stragglers.update(straggler, middle)
        metrics |= {f"lr/{name}": rate for name, rate in rates.items()} | {"epoch": float(epoch)}
        self._logger.metrics(metrics, state.global_step)
        self._gauges.set({**metrics, "step": float(state.global_step), "AP": history[-1]["AP"] if history else None})
        self._last_logged = epoch
        self.post_progress(self._meter.line(epoch, self._epochs, _newest_ap(history)))

    def show_evaluation(self, history: History) -> None:
        """Show the newest entry of `history`, from an inline evaluation that has just ended."""
        self._gauges.set({"AP": history[-1]["AP"]})
        if self._last_logged is not None:
            self.post_progress(self._meter.line(self._last_logged, self._epochs, _newest_ap(history)))

    def flush(self) -> None:
        """Write the step files before a checkpoint: steps up to here are not recorded again after a resume."""
        if self._steps is not None:
            self._steps.flush()

    def close(self) -> None:
        """Write what is not written yet."""
        self._profiler.close(self._last)
        self.flush()

    def post_progress(self, line: str, keep: bool = False) -> None:
        """Show `line` at the driver. It replaces the last one; with `keep` it stays."""
        if self._control is None:
            return
        try:
            self._control.post_progress.remote(line, keep)
        except Exception as error:  # the driver is gone; Ray then ends this worker, too
            log.info("the driver cannot be reached, progress is no longer shown: %s", type(error).__name__)
            self._control = None


def _newest_ap(history: History) -> str:
    """The AP of the newest evaluation and its epoch, as text."""
    return f"{history[-1]['AP']:.4f} (epoch {history[-1]['epoch'] + 1:.0f})" if history else "-"

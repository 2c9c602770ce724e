"""Ray Tune's three views of a sweep: where trials come from, which are stopped, and how they end.

Ray calls all of them in the driver's process, one at a time. They pass the events on to `Sweep`, which decides.
"""

from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline.errors import DiskFullError, InputError
from pipeline.files.storage import join
from pipeline.launch.failures import find_cause
from pipeline.runs.evaluations import from_report
from tune.search.ledger import read_report
from tune.trials.on_disk import is_finished, keep_best_checkpoint, losing_trials
from tune.trials.state import Sweep

NAME = "trial"  # the key of a trial's name in its config


class LedgerSearch(Searcher):
    """Gives Tune the trials that `Sweep` starts."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric=sweep.space.search.metric, mode="max")
        self._sweep = sweep

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Nothing is left to be set."""
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The config of the next trial; None if none can start now."""
        trial = self._sweep.next_trial()
        if trial is None:
            return Searcher.FINISHED if self._sweep.finished else None
        part = {"epochs": self._sweep.target_epochs} if self._sweep.space.search.early_stop == "pbt" else {}
        return {NAME: trial.name, "repeat": trial.repeat, "values": dict(trial.values), **part}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Not needed: `LedgerCallback` knows the error, too."""

    def save(self, checkpoint_path: str) -> None:
        """Not needed: the ledger holds the state."""


class LedgerScheduler(FIFOScheduler):
    """Stops the trials that the sweep's stopping rule rejects."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note the evaluation and decide."""
        name = trial.config[NAME]
        row = from_report("", result)
        report = row and read_report(name, row.entry, self._sweep.space.search.metric)
        return str(TrialScheduler.STOP if report and self._sweep.report(report) else TrialScheduler.CONTINUE)


class LedgerCallback(tune.Callback):
    """Notes how trials end, and keeps only the best checkpoint of those that have lost."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._reduced: set[str] = set()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune for trials that finished and for those that were stopped."""
        name, folder = trial.config[NAME], self._sweep.space.base.storage
        if self._sweep.ledger.trial(name).status == "running" and not is_finished(folder, name):
            self._sweep.fail(name, "it ended before its last step")
        else:
            self._sweep.end(name)
        self.reduce_losing(but=name)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune after a failure."""
        name = trial.config[NAME]
        cause, final = describe(read_error(trial))
        self._sweep.fail(name, cause, final)
        self.reduce_losing(but=name)

    def reduce_losing(self, but: str = "") -> None:
        """Remove checkpoints of trials that have lost, except those of `but`, whose processes may still be writing."""
        for name in losing_trials(self._sweep.ledger):
            if name != but and name not in self._reduced:
                keep_best_checkpoint(join(self._sweep.space.base.storage, name))
                self._reduced.add(name)


def read_error(trial: Any) -> BaseException | None:
    """The exception of a trial in Tune that has just failed; None if there is none.

    The driver has written it into Tune's folder on its own disk. `trial.get_pickled_error` reads the storage, to which
    Tune copies it only later.
    """
    path = trial.pickled_error_file
    if path is None or not Path(path).exists():
        return None
    error: BaseException = cloudpickle.loads(Path(path).read_bytes())
    return error


def describe(error: BaseException | None) -> tuple[str, bool]:
    """The cause of a trial's failure as one line, and whether another attempt would fail too."""
    if error is None:
        return "no reason was given", False
    if isinstance(error, RayActorError):
        return "the process of the trial's driver died (killed, out of memory, or its node is gone)", False
    cause = find_cause([error])
    lines = str(cause or getattr(error, "cause", None) or error).strip().splitlines()
    return (lines[-1] if lines else repr(error)), isinstance(cause, InputError | DiskFullError)

"""A running sweep: its ledger in memory, which every event changes and writes to disk, and the stopping rule.

Independent of Ray's processes, so that tests play a sweep without them. A ledger that cannot be written is a warning;
the next event writes it again.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from pipeline.errors import RunError, SweepError
from pipeline.logs import get_logger
from tune.search.ledger import (
    ENDED,
    Ledger,
    Report,
    Trial,
    add_report,
    clear_takes,
    end_trial,
    fail_trial,
    start_trial,
)
from tune.search.pbt import takers, target_epochs
from tune.search.plan import next_step, status_at_end
from tune.search.stopping import StoppingRule
from tune.space import Space

log = get_logger("sweep")


class Sweep:
    """A running sweep.

    Args:
        space: checked, with `storage` set to the sweep's folder.
        ledger: at the start.
        write: writes the ledger to disk; an OSError is a warning.
        copy: gives a trial the last checkpoint of another one; called with the names of donor and taker.
        clock: seconds from any zero point.
    """

    def __init__(
        self,
        space: Space,
        ledger: Ledger,
        write: Callable[[Ledger], None],
        copy: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.space = space
        self._rule = StoppingRule(space)
        self.ledger = self._rule.replay(ledger)
        self._write, self._copy = write, copy
        self._clock, self._start, self._before = clock, clock(), ledger.seconds
        self._finished = False
        self.save()

    @property
    def finished(self) -> bool:
        """Whether the last call of `next_trial` found nothing left to do."""
        return self._finished

    @property
    def target_epochs(self) -> int:
        """The epoch to which trials train now."""
        return target_epochs(self.space, self.ledger)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return not takers(self.ledger) and next_step(self.space, self._timed()).action == "end"

    def next_trial(self) -> Trial | None:
        """Start the next trial and return it; None if none can start now.

        Raises:
            SweepError: a checkpoint cannot be handed over (pbt).
        """
        self._hand_over()
        step = next_step(self.space, self._timed())
        if step.action == "exchange":
            self.ledger = step.ledger
            self.save()
            self._hand_over()
            step = next_step(self.space, self._timed())
        self._finished = step.action == "end"
        if step.action != "start":
            return None
        self.ledger = start_trial(step.ledger, step.trial)
        self.save()
        return self.ledger.trial(step.trial)

    def report(self, report: Report) -> bool:
        """Note an evaluation; True if its trial is to be stopped."""
        known = self.ledger
        if known.trial(report.trial).status in ENDED:
            return False  # its processes were not gone yet
        self.ledger = add_report(known, report)
        if self.ledger is known:
            return False
        stop = self._rule.stops(report)
        if stop:
            self.ledger = end_trial(self.ledger, report.trial, "stopped early")
        self.save()
        return stop

    def end(self, name: str) -> None:
        """Note that a trial's run has trained to its end, unless it was stopped."""
        status = status_at_end(self.space, self.ledger, name)
        if status == "waiting":  # its part of pbt
            self.fail(name, f"it has no {self.space.search.metric} after its last epoch", final=True)
            return
        self.ledger = end_trial(self.ledger, name, status)
        self.save()

    def fail(self, name: str, cause: str, final: bool = False) -> None:
        """Note a failure of a trial.

        Args:
            name: of the trial.
            cause: one line.
            final: whether another attempt would fail too.
        """
        self.ledger = fail_trial(self.ledger, name, cause, limit=0 if final else self.space.search.trial_failures)
        trial = self.ledger.trial(name)
        again = "" if trial.status == "failed" else "; it starts again from its last checkpoint"
        log.warning("trial %s failed: %s%s", name, cause, again)
        self.save()

    def _hand_over(self) -> None:
        """Give each trial of an exchange its checkpoint. After a kill it is done again, because donors still wait."""
        for trial in takers(self.ledger):
            try:
                self._copy(trial.takes, trial.name)
            except (OSError, RunError) as error:
                raise SweepError(
                    f"cannot give trial {trial.name} the checkpoint of {trial.takes}: {error}; the same command with "
                    "--resume tries it again"
                ) from error
            self.ledger = clear_takes(self.ledger, trial.name)
            self.save()

    def save(self) -> None:
        """Write the ledger."""
        self.ledger = self._timed()
        try:
            self._write(self.ledger)
        except OSError as error:
            log.warning("cannot write the ledger of the sweep in %s: %s", self.space.base.storage, error)

    def _timed(self) -> Ledger:
        return replace(self.ledger, seconds=self._before + self._clock() - self._start)

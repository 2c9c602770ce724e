"""Search spaces for tests, and sweeps that are played without Ray: trials report made-up scores, and may be killed."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config
from tune.search.ledger import Ledger, Report, Trial, format_ledger, new_ledger, parse_ledger
from tune.search.pbt import boundaries, target_epochs
from tune.search.plan import RunState, reconcile
from tune.settings import Domain, Search
from tune.space import Axis, Space
from tune.trials.state import Sweep

EPOCHS = 4
AXES = {
    "optim.lr": {"loguniform": (1e-4, 1e-3)},
    "optim.drop_epochs": {"choice": ([2], [3], [2, 3])},
}
Score = Callable[[Trial, int], float]


def make_space(search: Mapping[str, Any], axes: Mapping[str, Any] = AXES, epochs: int = EPOCHS) -> Space:
    """A checked space over the default config; joined keys are separated by a comma."""
    base = Config.model_validate({"name": "sweep", "train": {"epochs": epochs}})
    made = tuple(Axis(tuple(keys.split(", ")), Domain(**domain)) for keys, domain in axes.items())
    return Space(base, Search.model_validate(search), made)


def score_of(trial: Trial, epoch: int) -> float:
    """A made-up score that grows with the epochs and depends on values and repeat."""
    text = json.dumps([dict(trial.values), trial.repeat], sort_keys=True)
    return epoch / 100 + (sum(map(ord, text)) % 97) / 1000


@dataclass
class Play:
    """A sweep without Ray. What its trials have trained and the ledger's last text survive a kill."""

    space: Space
    score: Score = score_of
    written: str = ""
    trained: dict[str, list[Report]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sweep = Sweep(self.space, new_ledger(self.space, {}), self._write, self._copy, lambda: 0.0)

    def _write(self, ledger: Ledger) -> None:
        self.written = format_ledger(ledger).decode()

    def _copy(self, donor: str, taker: str) -> None:
        self.copies.append((donor, taker))
        assert len(self.trained[donor]) == len(self.trained[taker])  # nobody has trained on

    def read(self) -> Ledger:
        """The ledger as the next start finds it."""
        return parse_ledger(self.written.encode())

    def kill(self) -> None:
        """Kill the driver and resume."""
        self.running.clear()
        ends = (*boundaries(self.space), EPOCHS)
        runs = {name: RunState(tuple(rows), len(rows) in ends) for name, rows in self.trained.items()}
        self.sweep = Sweep(self.space, reconcile(self.space, self.read(), runs), self._write, self._copy, lambda: 0.0)

    def start(self) -> bool:
        """Start a trial, if one can start."""
        trial = self.sweep.next_trial()
        if trial is None:
            return False
        self.starts.append(trial.name)
        self.running.append(trial.name)
        self.trained.setdefault(trial.name, [])
        return True

    def train(self, place: int, killed: bool = False) -> None:
        """One of the running trials trains an epoch; the driver may be killed before it gets the report."""
        if not self.running:
            return
        name = self.running[place % len(self.running)]
        rows, trial = self.trained[name], self.sweep.ledger.trial(name)
        epoch = len(rows) + 1
        rows.append(Report(name, epoch, epoch * 10, self.score(trial, epoch)))
        if killed:
            self.kill()
            return
        stop = self.sweep.report(rows[-1])
        if stop or epoch == target_epochs(self.space, self.sweep.ledger):
            self.running.remove(name)
            self.sweep.end(name)

    def fail(self, place: int) -> None:
        """One of the running trials dies; its epochs stay."""
        if self.running:
            name = self.running.pop(place % len(self.running))
            self.sweep.fail(name, "out of memory")

    def act(self, actions: Iterable[tuple[str, int]]) -> None:
        """Do named actions, each for the running trial of a number."""
        for action, place in actions:
            if action == "start":
                self.start()
            elif action == "train":
                self.train(place)
            elif action == "kill":
                self.kill()
            elif action == "kill in an epoch":
                self.train(place, killed=True)
            else:
                self.fail(place)

    def finish(self) -> Ledger:
        """Play to the end without another fault; returns the ledger."""
        for _ in range(10_000):
            while self.start():
                pass
            if not self.running:
                assert self.sweep.finished
                return self.sweep.ledger
            self.train(0)
        raise AssertionError("the sweep does not end")

"""`python -m tune.sweep` as a process that tests kill, and what its ledger says."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint import WEIGHTS
from pipeline.evaluation.coco import METRICS
from pipeline.model.weights.files import file_digest
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import read_run
from support.paths import ROOT
from support.workspace import Workspace
from tune.search.ledger import ENDED, FILE, Ledger, parse_ledger

WAIT_SECONDS = 300.0


class SweepProcess:
    """A sweep over the tests' small model, on the Ray at `address`.

    Args:
        workspace: the data and the folder of the runs.
        name: of the sweep.
        address: of Ray.
        search: the section `search` of the space file.
        space: its section `space`.
        overrides: further settings of all trials.
    """

    def __init__(
        self,
        workspace: Workspace,
        name: str,
        address: str,
        search: dict[str, Any],
        space: dict[str, Any],
        **overrides: Any,
    ) -> None:
        settings = {"scaling.num_workers": 1, **{key.replace("__", "."): value for key, value in overrides.items()}}
        tree = {
            "config": str(ROOT / "jobs/configs/demo.yaml"),
            "overrides": {**workspace.overrides(name), **settings},
            "search": search,
            "space": space,
        }
        for key in ("evaluation.where", *(key for keys in space for key in keys.split(", "))):
            tree["overrides"].pop(key, None)
        self._file = workspace.folder / f"{name}.yaml"
        self._file.write_text(yaml.safe_dump(tree, sort_keys=False))
        self._log = workspace.folder / f"{name}.log"
        self._address = address
        self.folder = workspace.folder / "runs" / name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        """Start it, or with `--resume` continue it."""
        environment = {**os.environ, "RAY_ADDRESS": self._address, "PYTHONPATH": str(ROOT)}
        with self._log.open("a") as log:
            command = [sys.executable, "-m", "tune.sweep", str(self._file), *flags]
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL to its driver."""
        assert self.process
        self.process.kill()
        self.process.wait()

    def interrupt(self, number: int) -> int:
        """Send its driver a signal; returns the exit code."""
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(timeout=WAIT_SECONDS)

    def finish(self) -> Ledger:
        """Wait for its good end; returns the ledger."""
        assert self.process
        code = self.process.wait(timeout=2 * WAIT_SECONDS)
        assert code == 0, self.said
        return self.ledger

    def wait(self, until: Callable[[Ledger], bool]) -> None:
        """Wait until its ledger is as wanted."""
        assert self.process
        deadline = time.monotonic() + WAIT_SECONDS
        while not ((self.folder / FILE).exists() and until(self.ledger)):
            assert self.process.poll() is None, f"it ended before:\n{self.said}"
            assert time.monotonic() < deadline, f"it did not come to it:\n{self.said}"
            time.sleep(0.1)

    @property
    def ledger(self) -> Ledger:
        """The ledger as it is on disk."""
        return parse_ledger((self.folder / FILE).read_bytes())

    @property
    def said(self) -> str:
        return self._log.read_text()[-6000:]

    def scores(self, trial: str) -> list[list[float]]:
        """All COCO numbers of a trial, by evaluation."""
        return [[row.entry[name] for name in METRICS] for row in read_evaluations(str(self.folder / trial))]

    def weights(self, trial: str) -> str:
        """Digest of the weights in the trial's last checkpoint."""
        return file_digest(Path(read_run(str(self.folder / trial)).last or "") / WEIGHTS)

    def run_id(self, trial: str) -> str:
        """The trial's MLflow run."""
        return str(read_run(str(self.folder / trial)).run_id)


def in_second_trial(ledger: Ledger) -> bool:
    """One trial has ended, another one runs and was evaluated."""
    running = {trial.name for trial in ledger.with_status("running")}
    ended = [trial for trial in ledger.trials if trial.status in ENDED]
    return bool(ended) and any(report.trial in running for report in ledger.reports)

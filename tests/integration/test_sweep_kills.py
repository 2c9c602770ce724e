"""Sweeps whose driver, raylet or worker is killed end with the trials, values and APs of an undisturbed sweep.

`test_sweep.py` has the short form.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.chaos import Driver, Nodes, kill
from support.sweep_process import SweepProcess
from support.workspace import Workspace

from pipeline.launch.ray_internals import WORKER_TITLE
from tune.search.ledger import Ledger

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket"),  # Ray leaves some to the garbage collector
]
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {"sampler": "random", "scheduler": "none", "samples": 3, "concurrent": 1},
    "asha": {"sampler": "random", "scheduler": "asha", "samples": 4, "reduction": 2, "concurrent": 1, "seed": 3},
    "tpe": {"sampler": "tpe", "scheduler": "none", "samples": 3, "concurrent": 1},
}
SPACE = {"optim.lr, optim.backbone_lr": {"loguniform": [1e-5, 1e-3]}, "loss.giou_weight": {"choice": [1.0, 2.0]}}
WAIT_SECONDS = 180.0
CODES = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 75)}  # signal and exit code


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes(2)
    yield made
    made.close()


@pytest.fixture(scope="module")
def trained(workspace: Workspace, nodes: Nodes) -> Path:
    """A run from whose weights all trials start, so that their APs are above 0 and equal APs say something."""
    config = workspace.config(
        "trained",
        data__val=str(workspace.folder / "train"),
        scaling__num_workers=1,
        model__dropout=0.0,
        optim__lr=2e-3,
        optim__backbone_lr=2e-3,
        optim__drop_epochs=[30],
        train__epochs=40,
        train__eval_epochs=40,
        train__log_steps=40,
    )
    Driver(config, nodes.address, workspace.folder / "trained").finish()
    return workspace.folder / "runs" / "trained"


@pytest.fixture(scope="module")
def search(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make_sweep(search: str, workspace: Workspace, nodes: Nodes, trained: Path) -> Callable[..., SweepProcess]:
    """Make a sweep of a name, with changes of its search; it is not started."""

    def make(name: str, **changes: Any) -> SweepProcess:
        return SweepProcess(
            workspace,
            f"{search}-{name}",
            nodes.address,
            SEARCHES[search] | changes,
            SPACE,
            data__val=str(workspace.folder / "train"),
            model__init_from=str(trained),
            train__epochs=3,
            train__eval_epochs=1,
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(make_sweep: Callable[..., SweepProcess]) -> dict[str, Any]:
    """What a sweep ends with if nothing happens to it."""
    sweep = make_sweep("undisturbed")
    sweep.start()
    ledger = sweep.finish()
    finals = [ledger.score(trial.name) or 0 for trial in ledger.trials]
    assert min(finals) > 0
    assert len(set(finals)) == len(finals)
    return end_of(sweep, ledger)


def end_of(sweep: SweepProcess, ledger: Ledger) -> dict[str, Any]:
    """Values, how it ended, all scores and the last weights of each trial, by its number.

    A trial that is stopped may train on for a moment: its scores without a report and its weights are left out.
    """
    found = {}
    for trial in ledger.trials:
        reports = sum(report.trial == trial.name for report in ledger.reports)
        weights = sweep.weights(trial.name) if trial.status == "finished" else ""
        scores = sweep.scores(trial.name)[:reports]
        found[trial.name.rpartition("-")[2]] = (trial.values, trial.status, scores, weights)
    return found


def find_worker(nodes: Nodes) -> int:
    """The process of the trial's one Train worker."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        for raylet in nodes.raylets:
            for child in psutil.Process(raylet).children(recursive=True):
                if " ".join(child.cmdline()).startswith(WORKER_TITLE):
                    return child.pid
        time.sleep(0.1)
    raise AssertionError("no worker was found")


def strike(victim: str, sweep: SweepProcess, nodes: Nodes) -> None:
    if victim == "driver":
        sweep.kill()
        sweep.start("--resume=auto")
    elif victim in CODES:
        number, code = CODES[victim]
        assert sweep.interrupt(number) == code, sweep.said
        assert "--resume" in sweep.said.splitlines()[-1]
        sweep.start("--resume")
    elif victim == "worker":
        kill(find_worker(nodes))
    else:
        nodes.kill_raylet(nodes.raylet_of_worker(find_worker(nodes)))


def strike_after(victims: Mapping[int, str], sweep: SweepProcess, nodes: Nodes) -> dict[str, Any]:
    """Run a sweep, and strike the victims after these numbers of reports; returns what it ends with."""
    sweep.start()
    for reports, victim in victims.items():
        sweep.wait(lambda ledger, reports=reports: len(ledger.reports) >= reports)  # type: ignore[misc]
        strike(victim, sweep, nodes)
    return end_of(sweep, sweep.finish())


@pytest.mark.parametrize("search", ["random"], indirect=True)
def test_sweep_of_two_trials_at_a_time_after_kill_loses_and_repeats_no_trial(
    nodes: Nodes, make_sweep: Callable[..., SweepProcess], undisturbed: dict[str, Any]
) -> None:
    """Whatever the order in which they ran, the trials and their APs are the same."""
    assert strike_after({2: "driver"}, make_sweep("two", concurrent=2), nodes) == undisturbed


@pytest.mark.parametrize("search", ["random"], indirect=True)
def test_sweep_after_signals_says_how_to_continue_and_ends_like_an_undisturbed_one(
    nodes: Nodes, make_sweep: Callable[..., SweepProcess], undisturbed: dict[str, Any]
) -> None:
    assert strike_after({1: "Ctrl-C", 4: "SIGTERM"}, make_sweep("signals"), nodes) == undisturbed


@pytest.mark.parametrize("search", SEARCHES, indirect=True)
def test_sweep_after_kills_of_worker_driver_and_raylet_ends_like_an_undisturbed_one(
    nodes: Nodes, make_sweep: Callable[..., SweepProcess], undisturbed: dict[str, Any]
) -> None:
    """In one sweep, because each costs minutes: in the first trial, the second, and that of the next report."""
    assert strike_after({1: "worker", 4: "driver", 5: "raylet"}, make_sweep("kills"), nodes) == undisturbed

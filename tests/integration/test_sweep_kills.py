"""Sweeps whose driver, raylet or worker is killed end with the trials, values and APs of an undisturbed sweep.

`test_sweep.py` has the short form.
"""

import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.chaos import Nodes, kill
from support.sweep_process import SweepProcess, in_second_trial
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
SPACE = {"optim.lr, optim.backbone_lr": {"loguniform": [1e-5, 1e-3]}, "model.dec_points": {"choice": [1, 2]}}
WAIT_SECONDS = 60.0
CODES = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 75)}  # signal and exit code


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    made = Nodes(2)
    yield made
    made.close()


@pytest.fixture(scope="module", params=SEARCHES)
def search(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(search: str, workspace: Workspace, nodes: Nodes) -> dict[str, Any]:
    """What a sweep ends with if nothing happens to it."""
    sweep = make_sweep(workspace, nodes, search, "undisturbed")
    sweep.start()
    return end_of(sweep, sweep.finish())


def make_sweep(workspace: Workspace, nodes: Nodes, search: str, name: str, **changes: Any) -> SweepProcess:
    chosen = SEARCHES[search] | changes
    return SweepProcess(
        workspace, f"{search}-{name}", nodes.address, chosen, SPACE, train__epochs=3, train__eval_epochs=1
    )


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


@pytest.mark.parametrize("search", ["random"], indirect=True)
@pytest.mark.parametrize("victim", CODES)
def test_sweep_after_a_signal_says_how_to_continue_and_ends_like_an_undisturbed_one(
    search: str, victim: str, workspace: Workspace, nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    sweep = make_sweep(workspace, nodes, search, victim)
    sweep.start()
    sweep.wait(in_second_trial)
    strike(victim, sweep, nodes)
    assert end_of(sweep, sweep.finish()) == undisturbed


@pytest.mark.parametrize("victim", ["driver", "raylet", "worker"])
def test_sweep_after_kill_ends_like_an_undisturbed_one(
    search: str, victim: str, workspace: Workspace, nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    sweep = make_sweep(workspace, nodes, search, victim)
    sweep.start()
    sweep.wait(in_second_trial)
    strike(victim, sweep, nodes)
    ledger = sweep.finish()
    assert end_of(sweep, ledger) == undisturbed


@pytest.mark.parametrize("search", ["random"], indirect=True)
def test_sweep_of_two_trials_at_a_time_after_kill_loses_and_repeats_no_trial(
    search: str, workspace: Workspace, nodes: Nodes, undisturbed: dict[str, Any]
) -> None:
    """Whatever the order in which they ran, the trials and their APs are the same."""
    sweep = make_sweep(workspace, nodes, search, "two", concurrent=2)
    sweep.start()
    sweep.wait(lambda ledger: len(ledger.reports) >= 2)
    strike("driver", sweep, nodes)
    assert end_of(sweep, sweep.finish()) == undisturbed

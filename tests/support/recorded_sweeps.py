"""Sweeps on disk and in MLflow as the product leaves them, from sweeps that were played without Ray."""

from dataclasses import replace
from pathlib import Path

from pipeline.config import Config, dump
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.runs.evaluations import Evaluation, write_evaluations
from pipeline.runs.record import RunRecord, write_run
from pipeline.tracking.logger import RunLogger
from pipeline.tracking.run import finish_run, start_run
from pipeline.training.monitoring.steplog import StepLog
from support.helpers import tiny_config
from support.sweeps import Play
from tune.search.ledger import ENDED, Ledger, Report, Trial, write_ledger
from tune.space import Space

STEPS = 10  # of an epoch, as `support.sweeps` counts them


def small_base(folder: Path, epochs: int, **sections: object) -> Config:
    """A config for `Play` with a small model, and shards that exist."""
    if not (folder / "val").is_dir():
        annotations, images = write_synthetic(folder / "raw", images=8, seed=3, size=96)
        build_shards(annotations, images, folder / "val")
    return tiny_config(name="sweep", train={"epochs": epochs}, data={"val": str(folder / "val")}, **sections)


def numbers_of(report: Report) -> dict[str, float]:
    """Made-up COCO numbers of an evaluation."""
    score = report.score
    shares = {"AP": 1.0, "AP50": 1.5, "AP75": 1.1, "AP_small": 0.5, "AP_medium": 0.9}
    return {name: score * share for name, share in shares.items()} | {"AP_large": -1.0}


def record_sweep(space: Space, ledger: Ledger, folder: Path, *, tracked: bool = True) -> Ledger:
    """Write the ledger and the trials' runs into `folder`, and with `tracked` all of it into the store of the config.

    Returns:
        The ledger with the parent's run id, as it was written.
    """
    base = space.base.model_copy(update={"storage": str(folder)})
    parent = start_run(base.tracking, base, base.name) if tracked else None
    for trial in ledger.trials:
        reports = [report for report in ledger.reports if report.trial == trial.name]
        if trial.status != "waiting" or reports:
            _record_trial(space, folder, trial, reports, parent)
    finish_run(base.tracking.uri, parent, "FINISHED")
    ledger = replace(ledger, config=dump(base), run_id=parent)
    write_ledger(str(folder), ledger)
    return ledger


def _record_trial(space: Space, folder: Path, trial: Trial, reports: list[Report], parent: str | None) -> None:
    name, status = trial.name, "FINISHED" if trial.status in ENDED else "RUNNING"
    run = folder / name
    config = space.base.model_copy(
        update={"name": name, "storage": str(folder), "seed": space.base.seed + trial.repeat}
    )
    run_id = start_run(config.tracking, config, name, parent_run_id=parent) if parent else None
    steps = StepLog(str(run), 0, 0)
    rows = []
    with RunLogger(config.tracking.uri, run_id) as logger:
        for report in reports:
            for step in range(report.step - STEPS, report.step):
                steps.add(report.epoch - 1, step + 1, {"seconds": 0.5 + report.epoch / 100, "loss": 1.0})
            entry = {"epoch": float(report.epoch - 1), "step": float(report.step), **numbers_of(report)}
            checkpoint = f"checkpoint_{report.step:08d}_0123abcd"
            (run / checkpoint).mkdir(parents=True)
            rows.append(Evaluation(checkpoint, entry))
            logger.metrics(rows[-1].metrics, report.step)
    steps.flush()
    write_evaluations(str(run), rows)
    last = str(run / rows[-1].checkpoint) if rows else None
    write_run(RunRecord(name, str(run), dump(config), run_id, status, last=last))
    if run_id:
        finish_run(config.tracking.uri, run_id, "FINISHED")


def play_all(space: Space) -> Ledger:
    """The ledger of a sweep that was played to its end."""
    return Play(space).finish()

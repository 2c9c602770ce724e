"""What a run wrote of its steps and evaluations."""

import json
from pathlib import Path

import mlflow

from pipeline.evaluation.coco import METRICS
from pipeline.evaluation.verification.request import VERIFIED
from pipeline.launch.run_report import report_run
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import RunRecord
from pipeline.runs.verifications import read_verdicts
from support.waiting import wait_until
from support.workspace import Workspace


def losses(workspace: Workspace, record: RunRecord) -> dict[int, list[float]]:
    """Logged loss values by step; more than one value means that a step was logged twice."""
    assert record.run_id
    client = mlflow.MlflowClient(workspace.tracking_uri)
    by_step: dict[int, list[float]] = {}
    for metric in client.get_metric_history(record.run_id, "train/loss"):
        by_step.setdefault(metric.step, []).append(metric.value)
    return by_step


def step_lines(record: RunRecord) -> list[int]:
    files = sorted(Path(record.folder).glob("steps/*.jsonl"))
    return [json.loads(line)["step"] for file in files for line in file.read_text().splitlines()]


def assert_report_has_the_numbers_of(record: RunRecord) -> None:
    """The report at the end of a run, made again, has the numbers of the run's record."""
    assert report_run(record)
    numbers = json.loads((Path(record.folder) / "analysis" / "analysis.json").read_text())
    expected = {name: record.metrics[f"val/{name}"] for name in METRICS}
    assert {name: each["value"] for name, each in numbers["metrics"].items()} == expected


def assert_last_evaluation_is_verified(workspace: Workspace, record: RunRecord, step: int) -> None:
    """Pycocotools has found the last evaluation's numbers, too."""
    client = mlflow.MlflowClient(workspace.tracking_uri)
    # the process of the verification may outlive the run
    wait_until(lambda: "equals" in client.get_run(record.run_id or "").data.tags.get(VERIFIED, ""))
    verdict = read_verdicts(record.folder)[-1]
    assert verdict.step == step
    assert verdict.differences == []
    assert verdict.metrics.items() <= read_evaluations(record.folder)[-1].entry.items()

"""What a run wrote of its steps."""

import json
from pathlib import Path

import mlflow

from pipeline.runs.record import RunRecord
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

"""An evaluation that was made after the training, in the MLflow run that it belongs to: numbers, files, data set.

The numbers of a registered version are also shown on its page and in its tags. Raises TrackingError.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.index import ShardIndex
from pipeline.tracking.api import Point, TrackingClient
from pipeline.tracking.client import connect, mlflow_faults
from pipeline.tracking.lineage import LOGGED_MODEL_TAG, log_data
from pipeline.tracking.store import TrackingStore


@dataclass(frozen=True)
class LogTarget:
    """Where MLflow shows an evaluation."""

    store: TrackingStore
    run_id: str
    name: str = ""  # of the registered model; empty for a run
    version: str = ""
    model_id: str | None = None  # of the version's logged model

    @property
    def shown(self) -> str:
        """The run or the version, for messages."""
        return f"models:/{self.name}/{self.version}" if self.name else f"MLflow run {self.run_id}"


def log_evaluation(
    target: LogTarget, split: str, step: int, metrics: Mapping[str, float], data: ShardIndex, files: Path
) -> None:
    """Write an evaluation into a run and, if it is of a registered version, into that.

    A number that the run already has at this step is not written again. The version gets the COCO numbers as tags.

    Args:
        target: from `registry.locate.find_log_target`.
        split: name of the data, e.g. `test`.
        step: optimizer step of the weights.
        metrics: by name, e.g. `test/AP`.
        data: the shards that were evaluated.
        files: folder whose files become artifacts under `results`.

    Raises:
        TrackingError: MLflow does not answer or refuses.
    """
    client = connect(target.store)
    with mlflow_faults(target.store, f"did not take the evaluation of {target.shown}"):
        client.log_artifacts(target.run_id, str(files), "results")
        log_data(client, target.run_id, {split: data})
        now = int(time.time() * 1000)
        for key, value in metrics.items():
            same = _point(client, target.run_id, key, value, step)
            if same is None or target.model_id:  # the same point with the same time is not written twice
                time_ms = same.timestamp if same else now
                client.log_metric(target.run_id, key, value, time_ms, step, model_id=target.model_id)
            if target.name and key.count("/") == 1:  # the number of a class has two
                client.set_model_version_tag(target.name, target.version, key, repr(value))


def correct_evaluation(
    client: TrackingClient, run_id: str, step: int, wrong: Mapping[str, float], right: Mapping[str, float]
) -> None:
    """Write the numbers that stand into a run, and into its versions of the same step that have the wrong ones.

    Args:
        client: of the store.
        run_id: the run that has the wrong numbers.
        step: optimizer step of the weights.
        wrong: what was logged, by name, e.g. `val/AP`.
        right: what stands, by name; those that are not in `wrong` are written into the run only.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    client.log_batch(run_id, [Metric(key, value, now, step) for key, value in right.items()])
    for version in client.search_model_versions(f"run_id='{run_id}'"):
        if version.tags.get("step") != str(step):
            continue
        for key, value in wrong.items():
            if version.tags.get(key) == repr(value) and value != right[key]:
                client.set_model_version_tag(version.name, str(version.version), key, repr(right[key]))
                if model := version.tags.get(LOGGED_MODEL_TAG):
                    client.log_metric(run_id, key, right[key], now, step, model_id=model)


def _point(client: TrackingClient, run_id: str, key: str, value: float, step: int) -> Point | None:
    """The point that the run already has."""
    points = client.get_metric_history(run_id, key)
    return next((point for point in points if point.step == step and point.value == value), None)

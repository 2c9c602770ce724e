"""Entries on MLflow's pages of a run and a model besides settings and curves: data sets, source, user, version.

Raises whatever MLflow raises; the callers turn it into an error or a warning.
"""

import json
import shutil
import time
from collections.abc import Mapping

from pipeline.data.index import ShardIndex
from pipeline.files.credentials import without_login
from pipeline.tracking.api import TrackingClient

DIGEST_CHARACTERS = 36  # MLflow's limit
CLASS_METRIC = "val/AP_class/"  # and the category's id
THRESHOLD_METRIC, F1_METRIC = "val/threshold_class/", "val/F1_class/"  # the same, of the best threshold at IoU 0.5
CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}  # MLflow's words; others stay as they are
LOGGED_MODEL_TAG = "logged_model"  # of a version, because MLflow's databases do not keep its `model_id`
VERSIONS_TAG = "mlflow.modelVersions"  # tag of a logged model; its page lists these versions


def source_tags() -> dict[str, str]:
    """Tags with the user, the command and, if git is installed, the commit of this process.

    The address of the repository is left out, because it may contain a token.
    """
    from mlflow.tracking.context.git_context import GitRunContext
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_REPO_URL

    tags = resolve_tags(ignore=[] if shutil.which("git") else [GitRunContext])
    return {key: value for key, value in tags.items() if key != MLFLOW_GIT_REPO_URL}


def log_data(client: TrackingClient, run_id: str, data: Mapping[str, ShardIndex]) -> None:
    """Log the shard folders of a run as its data sets.

    Args:
        client: of the store.
        run_id: the run.
        data: the folder of each split, such as `train` and `val`.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for split, index in data.items():
        folder = without_login(index.folder)
        counts = {
            "images": len(index),
            "boxes": int(index.samples.boxes.sum()),
            "crowd_regions": int(index.samples.crowds.sum()),
            "categories": len(index.categories),
            "shards": len(index.shards),
            "digest": index.digest,
        }
        dataset = Dataset(
            name=f"{split}: {folder.rstrip('/').rpartition('/')[2]}",
            digest=index.digest[:DIGEST_CHARACTERS],
            source_type=folder.partition("://")[0] if "://" in folder else "local",
            source=json.dumps({"uri": folder}),
            profile=json.dumps(counts),
        )
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", CONTEXTS.get(split, split))]))
    client.log_inputs(run_id, inputs)


def log_model_metrics(
    client: TrackingClient, run_id: str, model_id: str, metrics: Mapping[str, float], step: int
) -> None:
    """Give a logged model the metrics of its evaluation, with the AP per class that the run has for that step.

    Args:
        client: of the store.
        run_id: the run that the model comes from; its curves get no duplicate points.
        model_id: the logged model.
        metrics: of the checkpoint, e.g. `val/AP`.
        step: of the checkpoint's weights.
    """
    classes = [key for key in client.get_run(run_id).data.metrics if key.startswith(CLASS_METRIC)]
    now = int(time.time() * 1000)
    for key in [*metrics, *classes]:
        points = [point for point in client.get_metric_history(run_id, key) if point.step == step]
        point = max(points, key=lambda each: each.timestamp, default=None)  # a verification may have added another
        if point is not None:
            client.log_metric(run_id, key, point.value, point.timestamp, step, model_id=model_id)
        elif key in metrics:
            client.log_metric(run_id, key, metrics[key], now, step, model_id=model_id)


def link_version(client: TrackingClient, model_id: str, name: str, version: str) -> None:
    """Link the logged model's page to version `version` of registered model `name`."""
    client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([{"name": name, "version": version}])})

"""`load_detector`: a name becomes a detector that predicts on images; the one call for use from Python.

`from pipeline import load_detector` gives the same function. Raises RunError, CheckpointError and TrackingError.
"""

from pathlib import Path

import torch

from pipeline.checkpoint import load_inference
from pipeline.inference.predictor import Predictor
from pipeline.registry.locate import checkpoint_folder


def load_detector(
    model: str | Path, *, device: str | torch.device | None = None, tracking_uri: str | None = None
) -> Predictor:
    """Load a trained detector; `load_detector("models:/mine@champion")(image)` are its detections.

    Args:
        model: a run (folder, URL, `run.json`, or name under `runs/`), a checkpoint (folder, or a file in it), or a
            registered version (`models:/NAME@ALIAS`, `models:/NAME/NUMBER`). A run gives its best checkpoint.
        device: of the model, such as "cpu" or "cuda:1"; by default a GPU if there is one.
        tracking_uri: the MLflow store of a registered version; by default `MLFLOW_TRACKING_URI`, else
            `sqlite:///runs/mlflow.db`.

    Raises:
        RunError: there is no such run, checkpoint or version.
        CheckpointError: it is damaged, or another version of this package wrote it.
        TrackingError: MLflow does not answer.
    """
    with checkpoint_folder(str(model), tracking_uri) as folder:
        return Predictor(load_inference(folder), device)

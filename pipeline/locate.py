"""From what names a model on the command line to its checkpoint folder. Used by the jobs that load one."""

from pathlib import Path

from pipeline.model.weight_files import STATE
from pipeline.runs import read_run
from pipeline.storage import local_folder


def checkpoint_folder(model: str, tracking_uri: str) -> Path:
    """The local checkpoint folder of a run, a registered version, or a checkpoint folder itself.

    Args:
        model: RUN (folder, `run.json`, or name under runs/), `models:/NAME@ALIAS`, or FOLDER.
        tracking_uri: the registry; read for `models:/` only.

    Raises:
        RunError: there is no such thing, or the run has no checkpoint.
        TrackingError: MLflow does not answer.
    """
    if model.startswith("models:"):
        from pipeline.registry import resolve  # only here: MLflow takes seconds to import

        return resolve(model, tracking_uri)
    if (Path(model) / STATE).is_file():
        return Path(model)
    return local_folder(read_run(model).checkpoint)

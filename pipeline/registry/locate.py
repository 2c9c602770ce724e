"""A model that is named on the command line: its checkpoint folder, and where MLflow shows its evaluations.

Raises RunError and TrackingError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files.storage import local_copy
from pipeline.model.weights.files import AVERAGE, STATE, WEIGHTS
from pipeline.runs.record import FILE as RUN_FILE
from pipeline.runs.record import read_run
from pipeline.tracking.client import connect, mlflow_faults
from pipeline.tracking.evaluations import LogTarget
from pipeline.tracking.store import choose_store

FILES = (STATE, WEIGHTS, AVERAGE)


@contextmanager
def checkpoint_folder(model: str, tracking_uri: str | None) -> Iterator[Path]:
    """The local checkpoint folder of a run, a registered version, or a checkpoint folder itself.

    Downloaded files are removed at the end of the context.

    Args:
        model: RUN (folder, `run.json`, or name under runs/), `models:/NAME@ALIAS`, or FOLDER or a file in it.
        tracking_uri: `--tracking-uri`, see `tracking.store`; used for `models:/` only.

    Raises:
        RunError: it does not exist, or the run has no checkpoint.
        TrackingError: MLflow does not answer.
    """
    if model.startswith("models:"):
        from pipeline.registry.register import resolve  # not at the top, because MLflow takes seconds to import

        with resolve(model, tracking_uri) as folder:
            yield folder
    elif own := _own_checkpoint(model):
        yield own
    else:
        with local_copy(read_run(model).checkpoint) as folder:
            yield folder


def pin_model(model: str, tracking_uri: str | None) -> tuple[str, str | None]:
    """What a model's name means now, for processes that start later and elsewhere; and the store of a version.

    An alias becomes a version, a run its best checkpoint. A run at a URL stays as it is.

    Raises:
        RunError: it does not exist, or the run has no checkpoint.
        TrackingError: MLflow does not answer.
    """
    if model.startswith("models:"):
        from pipeline.registry.register import pin_version  # see `checkpoint_folder`

        return pin_version(model, tracking_uri)
    checkpoint = _own_checkpoint(model) or Path(read_run(model).checkpoint)
    return (str(checkpoint.absolute()) if checkpoint.is_dir() else model), None


def _own_checkpoint(model: str) -> Path | None:
    """The checkpoint folder that `model` names, itself or by one of its files; None if it names something else."""
    path = Path(model)
    folder = path.parent if path.name in FILES else path
    if (folder / STATE).is_file():
        return folder
    if path.is_file() and path.name != RUN_FILE:
        raise RunError(
            f"{model} is not a file of a checkpoint folder ({', '.join(FILES)}); `python -m jobs.weights` makes a run "
            "of weights from outside"
        )
    return None


def find_log_target(model: str, tracking_uri: str | None) -> LogTarget:
    """Where MLflow shows evaluations of a run or a registered version; arguments as in `checkpoint_folder`.

    Raises:
        RunError: it does not exist, it is a checkpoint folder, or its MLflow run is deleted.
        TrackingError: MLflow does not answer.
    """
    if model.startswith("models:"):
        from pipeline.registry import register  # see `checkpoint_folder`

        return register.find_log_target(model, tracking_uri)
    if _own_checkpoint(model):
        raise RunError(f"{model} is a checkpoint, which has no MLflow run; give its run or a registered model")
    record = read_run(model)
    store = choose_store(tracking_uri, record=record)
    if record.run_id is None:
        raise RunError(f"run {record.name} has no MLflow run; `python -m jobs.register` makes one with its version")
    client = connect(store)
    with mlflow_faults(store, f"does not know run {record.run_id} of {record.name}"):
        run = client.get_run(record.run_id)
    if run.info.lifecycle_stage != "active":
        raise RunError(
            f"the MLflow run {record.run_id} of {record.name} is deleted; restore it, see `mlflow runs restore`"
        )
    return LogTarget(store, run.info.run_id)

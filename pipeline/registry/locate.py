"""A model that is named on the command line: its checkpoint folder, and where MLflow shows its evaluations.

Raises RunError and TrackingError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import RunError
from pipeline.files.storage import local_copy
from pipeline.model.weights.files import STATE
from pipeline.runs.record import read_run
from pipeline.tracking.client import connect, mlflow_faults
from pipeline.tracking.evaluations import LogTarget
from pipeline.tracking.store import choose_store


@contextmanager
def checkpoint_folder(model: str, tracking_uri: str | None) -> Iterator[Path]:
    """The local checkpoint folder of a run, a registered version, or a checkpoint folder itself.

    Downloaded files are removed at the end of the context.

    Args:
        model: RUN (folder, `run.json`, or name under runs/), `models:/NAME@ALIAS`, or FOLDER.
        tracking_uri: `--tracking-uri`, see `tracking.store`; used for `models:/` only.

    Raises:
        RunError: it does not exist, or the run has no checkpoint.
        TrackingError: MLflow does not answer.
    """
    if model.startswith("models:"):
        from pipeline.registry.register import resolve  # not at the top, because MLflow takes seconds to import

        with resolve(model, tracking_uri) as folder:
            yield folder
    elif (Path(model) / STATE).is_file():
        yield Path(model)
    else:
        with local_copy(read_run(model).checkpoint) as folder:
            yield folder


def find_log_target(model: str, tracking_uri: str | None) -> LogTarget:
    """Where MLflow shows evaluations of a run or a registered version; arguments as in `checkpoint_folder`.

    Raises:
        RunError: it does not exist, it is a checkpoint folder, or its MLflow run is deleted.
        TrackingError: MLflow does not answer.
    """
    if model.startswith("models:"):
        from pipeline.registry import register  # see `checkpoint_folder`

        return register.find_log_target(model, tracking_uri)
    if (Path(model) / STATE).is_file():
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

"""The checkpoint folder of a model that is named on the command line. Raises RunError and TrackingError."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.files.storage import local_copy
from pipeline.model.weights.files import STATE
from pipeline.runs.record import read_run


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

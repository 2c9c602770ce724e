"""The files of a registered version, which lie in any store that MLflow reads: that they are gone, or cannot be read.

MLflow passes the errors of the libraries of these stores on: that there is no login for S3 is one of botocore's. Raises
RunError and TrackingError.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import PipelineError, RunError, TrackingError, is_disk_full
from pipeline.tracking.api import File, TrackingClient
from pipeline.tracking.client import load_mlflow, mlflow_faults, text_of
from pipeline.tracking.store import TrackingStore, with_login

FILES = "artifacts/checkpoint"  # in the folder of a version's model
NEW_VERSION = "`python -m jobs.register RUN` makes a new version if they are gone; models of other tools have none"


def files_of(client: TrackingClient, store: TrackingStore, name: str, number: str) -> Sequence[File]:
    """The files of a version's checkpoint; none if they are gone, or if another tool registered the version.

    Raises:
        TrackingError: they cannot be listed.
    """
    uri = f"models:/{name}/{number}"
    source = f"{client.get_model_version_download_uri(name, number)}/{FILES}"
    with file_faults(store, uri):
        try:
            found: Sequence[File] = load_mlflow().artifacts.list_artifacts(
                artifact_uri=source, tracking_uri=with_login(store.uri)
            )
        except FileNotFoundError:
            return ()
    return found


@contextmanager
def file_faults(store: TrackingStore, uri: str) -> Iterator[None]:
    """Turn whatever is raised into errors of this project, but for a missing file: that is a FileNotFoundError.

    Raises:
        RunError: the disk here is full.
        TrackingError: the files cannot be read.
    """
    try:
        with mlflow_faults(store, f"did not give the files of {uri}"):
            try:
                yield
            except Exception as error:
                answer = getattr(error, "response", None)  # of an HTTP request
                if (
                    getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
                    or getattr(answer, "status_code", 0) == 404
                ):
                    raise FileNotFoundError(text_of(error)) from error
                raise
    except (PipelineError, FileNotFoundError):
        raise
    except Exception as error:
        if is_disk_full(error):
            raise RunError(f"cannot fetch {uri}: {error}; set TMPDIR to a disk with space") from error
        raise TrackingError(
            f"the files of {uri} cannot be read ({type(error).__name__}: {text_of(error)}); set the login of their "
            f"store. {NEW_VERSION}"
        ) from error

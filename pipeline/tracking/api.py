"""Types of the part of MLflow's client that this project calls, so that type checks do not import MLflow.

A test compares the signatures with those of the installed MLflow.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol


class Point(Protocol):
    """A metric's value at a step."""

    key: str
    value: float
    timestamp: int  # ms
    step: int


class Message(Protocol):
    """MLflow's message for the wire; unlike the entity it holds the step of each metric."""

    metrics: Iterable[Point]


class DataSet(Protocol):
    """A data set that a run read or evaluated."""

    name: str
    source: str  # JSON
    profile: str | None  # JSON


class DataSetInput(Protocol):
    """A data set among the inputs of a run."""

    dataset: DataSet


class RunInputs(Protocol):
    """The inputs of a run."""

    dataset_inputs: Sequence[DataSetInput]


class RunData(Protocol):
    """What a run logged: newest values."""

    metrics: Mapping[str, float]
    params: dict[str, str]
    tags: dict[str, str]

    def to_proto(self) -> Message:
        """With steps and times."""


class RunInfo(Protocol):
    """A run's identity."""

    run_id: str
    run_name: str
    experiment_id: str
    lifecycle_stage: str  # active | deleted
    start_time: int  # ms


class Run(Protocol):
    """A run."""

    info: RunInfo
    data: RunData
    inputs: RunInputs


class Experiment(Protocol):
    """A folder of runs."""

    experiment_id: str
    lifecycle_stage: str


class Page(Protocol):
    """Some of the runs that a search found."""

    token: str | None  # of the next page

    def __iter__(self) -> Iterator[Run]:
        """The runs."""


class LoggedModel(Protocol):
    """A model beside the run that made it."""

    model_id: str
    artifact_location: str


class RegisteredModel(Protocol):
    """A name in the registry."""

    name: str
    aliases: Mapping[str, str]  # version by alias
    tags: Mapping[str, str]


class ModelPage(Protocol):
    """Some of the registered models."""

    token: str | None  # of the next page

    def __iter__(self) -> Iterator[RegisteredModel]:
        """The models."""


class File(Protocol):
    """A file or folder among artifacts."""

    path: str
    is_dir: bool
    file_size: int | None


class ModelVersion(Protocol):
    """A version under a registered name."""

    name: str
    version: str
    run_id: str | None
    tags: Mapping[str, str]
    creation_timestamp: int  # ms


class TrackingClient(Protocol):
    """What is used of an `mlflow.MlflowClient`."""

    # experiments
    def get_experiment_by_name(self, name: str) -> Experiment | None:
        """Also a deleted one."""

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        """Its id; files go to the location."""

    def search_experiments(self) -> Iterable[Experiment]:
        """Those that are not deleted."""

    # runs
    def create_run(self, experiment_id: str, *, tags: dict[str, str] | None = None, run_name: str | None = None) -> Run:
        """A new one, running."""

    def get_run(self, run_id: str) -> Run:
        """Raises MlflowException."""

    def update_run(self, run_id: str, status: str | None = None) -> None:
        """Change its status."""

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        """Give it an end."""

    def search_runs(
        self,
        experiment_ids: list[str],
        *,
        filter_string: str = "",
        max_results: int = 1000,
        order_by: list[str] | None = None,
        page_token: str | None = None,
    ) -> Page:
        """The next page of those found."""

    # what a run holds
    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Write a tag."""

    def log_batch(self, run_id: str, metrics: Sequence[object] = (), params: Sequence[object] = ()) -> object:
        """Write `mlflow.entities.Metric` and `Param`."""

    def log_metric(
        self, run_id: str, key: str, value: float, timestamp: int | None, step: int | None, *, model_id: str | None
    ) -> object:
        """Write a point, also into a logged model."""

    def get_metric_history(self, run_id: str, key: str) -> Iterable[Point]:
        """All points of a metric."""

    def log_inputs(self, run_id: str, datasets: Sequence[object] | None = None) -> None:
        """Write `mlflow.entities.DatasetInput`."""

    def log_outputs(self, run_id: str, models: list[object]) -> None:
        """Write `mlflow.entities.LoggedModelOutput`."""

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """Write an artifact."""

    def log_artifact(self, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
        """Upload a file."""

    def log_artifacts(self, run_id: str, local_dir: str, artifact_path: str | None = None) -> None:
        """Upload a folder."""

    def list_artifacts(self, run_id: str, path: str | None = None) -> Sequence[File]:
        """What is in a folder; empty if there is none."""

    def download_artifacts(self, run_id: str, path: str, dst_path: str | None = None) -> str:
        """Download a file or folder; where it is now."""

    # logged models and the registry
    def create_logged_model(
        self,
        experiment_id: str,
        name: str | None = None,
        source_run_id: str | None = None,
        tags: dict[str, str] | None = None,
        params: dict[str, str] | None = None,
        model_type: str | None = None,
    ) -> LoggedModel:
        """A new one, pending."""

    def log_model_artifacts(self, model_id: str, local_dir: str) -> None:
        """Upload its files."""

    def finalize_logged_model(self, model_id: str, status: Literal["READY", "FAILED"]) -> LoggedModel:
        """Say that it is complete, or will never be."""

    def set_logged_model_tags(self, model_id: str, tags: dict[str, object]) -> None:
        """Write its tags."""

    def create_registered_model(self, name: str, *, description: str | None) -> RegisteredModel:
        """A new name. Raises MlflowException if it exists."""

    def get_registered_model(self, name: str) -> RegisteredModel:
        """Raises MlflowException."""

    def search_registered_models(self, *, page_token: str | None = None) -> ModelPage:
        """Some of all names, 100 at a time."""

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        """Point an alias at a version."""

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        """Write a tag of a name."""

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        """Remove a tag of a name."""

    def search_model_versions(self, filter_string: str | None = None) -> Iterable[ModelVersion]:
        """The versions of a name or a run."""

    def create_model_version(
        self,
        name: str,
        source: str,
        run_id: str | None = None,
        tags: dict[str, str] | None = None,
        *,
        description: str | None,
        model_id: str | None,
    ) -> ModelVersion:
        """A new version."""

    def delete_model_version(self, name: str, version: str) -> None:
        """Delete a version."""

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        """Write a tag."""

    def delete_model_version_tag(self, name: str, version: str, key: str) -> None:
        """Remove a tag."""

    def get_model_version_download_uri(self, name: str, version: str) -> str:
        """Where its files are."""

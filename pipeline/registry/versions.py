"""What is known of a registered version: aliases, tags, the settings and data of its run, its files.

A name, alias or version that does not exist is a RunError that lists the existing ones. A store that does not answer is
a TrackingError.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pipeline.checkpoint import STATE, TrainState, check_inference
from pipeline.errors import CheckpointError, TrackingError
from pipeline.logs import get_logger
from pipeline.registry.register import CHECKPOINT_TAG, VAL_DIGEST_TAG, find_version, resolve, versions_of
from pipeline.registry.version_files import files_of
from pipeline.tracking.api import ModelVersion, RegisteredModel, Run, TrackingClient
from pipeline.tracking.run import settings_of
from pipeline.tracking.store import TrackingStore

COMMIT_TAG, USER_TAG, FOLDER_TAG = "mlflow.source.git.commit", "mlflow.user", "run_folder"
# Settings that say where and how a run was computed, and not what came out of it.
PLACES = ("name", "storage", "tracking.", "scaling.", "data.cache_dir", "data.cache_gib", "data.workers")

log = get_logger("registry")


@dataclass(frozen=True)
class DataSet:
    """A shard folder that the run of a version used."""

    folder: str
    digest: str  # of its index


@dataclass(frozen=True)
class Version:
    """A registered version with its run, as far as MLflow still has it."""

    name: str
    number: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    created: datetime  # UTC
    run: Run | None  # None: it is deleted
    settings: Mapping[str, str] = field(default_factory=dict)  # by dotted name, as MLflow's parameters
    data: Mapping[str, DataSet] = field(default_factory=dict)  # by split, such as `train`

    @property
    def uri(self) -> str:
        """Its address."""
        return f"models:/{self.name}/{self.number}"

    @property
    def shown(self) -> str:
        """Its address with its aliases."""
        return self.uri + (f" (@{', @'.join(self.aliases)})" if self.aliases else "")

    @property
    def val_digest(self) -> str:
        """Digest of the validation shards of its run; empty if it is not known."""
        recorded = self.data.get("val")
        return self.tags.get(VAL_DIGEST_TAG) or (recorded.digest if recorded else "")

    def metric(self, key: str) -> float | None:
        """A number among its tags, such as `val/AP`; None if it has none, or the data have no such object."""
        try:
            value = float(self.tags.get(key, ""))
        except ValueError:
            return None
        return value if value >= 0 else None


def read_version(client: TrackingClient, model: RegisteredModel, which: str) -> Version:
    """The version with this number or alias. Raises RunError if there is none."""
    number = which.isdecimal()
    found = find_version(client, model, None if number else which, which if number else None)
    return describe_version(client, model, found)


def describe_version(client: TrackingClient, model: RegisteredModel, found: ModelVersion) -> Version:
    """A version with what MLflow knows of its run."""
    number = str(found.version)
    run = _run_of(client, found.run_id)
    return Version(
        name=model.name,
        number=number,
        aliases=tuple(sorted(alias for alias, version in model.aliases.items() if str(version) == number)),
        tags=found.tags,
        created=datetime.fromtimestamp(found.creation_timestamp / 1000, UTC),
        run=run,
        settings=settings_of(run) if run else {},
        data=_data_of(run) if run else {},
    )


def changed_settings(old: Version, new: Version) -> dict[str, tuple[str | None, str | None]]:
    """Settings in which two versions differ: key -> (old, new); None where a version has no such setting."""
    keys = sorted(old.settings.keys() | new.settings.keys()) if old.settings and new.settings else []
    pairs = {key: (old.settings.get(key), new.settings.get(key)) for key in keys if not _is_place(key)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and not _are_equal(*pair)}


@contextmanager
def open_files(version: Version, store: TrackingStore) -> Iterator[tuple[Path, TrainState]]:
    """The checkpoint folder of a version and its state, after the digests of all files were checked.

    Raises:
        CheckpointError: a file is missing or damaged, or is not the one that was registered.
        TrackingError: MLflow does not answer.
    """
    with resolve(version.uri, store) as folder:
        try:
            recorded = version.tags.get(CHECKPOINT_TAG)
            if recorded and hashlib.sha256((folder / STATE).read_bytes()).hexdigest() != recorded:
                raise CheckpointError(f"{STATE} is not the registered one")
            state = check_inference(folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"{version.shown} is damaged: {error}. Delete the version in MLflow and register its run again"
            ) from None
        yield folder, state


def list_versions(client: TrackingClient, model: RegisteredModel) -> list[ModelVersion]:
    """The versions of a model, newest first."""
    return sorted(versions_of(client, model.name), key=lambda version: -int(version.version))


def size_of(client: TrackingClient, store: TrackingStore, version: Version) -> int | None:
    """Bytes of a version's checkpoint; None if its files are gone, or (with a warning) cannot be listed."""
    try:
        files = files_of(client, store, version.name, version.number)
    except TrackingError as error:  # one store without a login must not hide the other versions
        log.warning("%s", error)
        return None
    return sum(file.file_size or 0 for file in files) or None


def _run_of(client: TrackingClient, run_id: str | None) -> Run | None:
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _data_of(run: Run) -> dict[str, DataSet]:
    """The shards among the inputs of a run, as `tracking.lineage.log_data` has written them."""
    found: dict[str, DataSet] = {}
    for each in run.inputs.dataset_inputs:
        split = each.dataset.name.partition(": ")[0]
        try:
            folder, digest = json.loads(each.dataset.source)["uri"], json.loads(each.dataset.profile or "")["digest"]
        except (ValueError, TypeError, KeyError):  # of other code
            continue
        found.setdefault(split, DataSet(str(folder), str(digest)))
    return found


def _are_equal(old: str | None, new: str | None) -> bool:
    """Whether two settings are one number: a config that was read from a record has 240.0 where the run's had 240."""
    try:
        return float(old or "") == float(new or "")
    except ValueError:
        return False


def _is_place(key: str) -> bool:
    return any(key == place or (place.endswith(".") and key.startswith(place)) for place in PLACES)

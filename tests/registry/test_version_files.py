"""Files of versions that are gone or cannot be read, and what a registration makes of it."""

import shutil
from typing import Any

import botocore.exceptions
import pytest
from support.inference import small_run
from support.promotions import NAME, Registry, open_registry

from pipeline.errors import RunError, TrackingError
from pipeline.registry.listing import list_rows
from pipeline.registry.register import register, resolve
from pipeline.registry.version_files import file_faults
from pipeline.tracking.client import load_mlflow
from pipeline.tracking.store import TrackingStore


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = open_registry(tmp_path_factory.mktemp("registry"))
    registry.add("first")
    return registry


def test_register_again_replaces_a_version_whose_files_are_gone(registry: Registry) -> None:
    record = small_run(registry.folder, "lost", seed=1)
    lost = register(record, NAME, "challenger")
    assert register(record, NAME, "challenger") == lost
    source = registry.client.get_model_version_download_uri(NAME, lost).removeprefix("file://")
    shutil.rmtree(source)
    with (
        pytest.raises(RunError, match=r"files of models:/mine/2 are gone .*jobs\.register RUN"),
        resolve(f"models:/{NAME}/{lost}", registry.uri),
    ):
        pass
    new = register(record, NAME, "challenger")
    assert new != lost
    assert registry.client.get_registered_model(NAME).aliases["challenger"] == int(new)
    with resolve(f"models:/{NAME}@challenger", registry.uri) as folder:
        assert (folder / "state.json").is_file()


def test_register_run_that_is_deleted_in_mlflow_gets_a_new_one(registry: Registry) -> None:
    record = small_run(registry.folder, "deleted", seed=2)
    registry.client.delete_run(record.run_id)
    number = register(record, "deleted", "challenger")
    run_id = registry.client.get_model_version("deleted", number).run_id
    assert run_id != record.run_id
    assert registry.client.get_run(run_id).info.lifecycle_stage == "active"


def test_store_without_a_login_is_an_error_of_one_version(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Botocore's errors are neither MLflow's nor OSErrors."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise botocore.exceptions.NoCredentialsError

    for name in ("download_artifacts", "list_artifacts"):
        monkeypatch.setattr(load_mlflow().artifacts, name, refuse)
    with (
        pytest.raises(TrackingError, match=r"cannot be read .*credentials"),
        resolve(f"models:/{NAME}/1", registry.uri),
    ):
        pass
    assert list_rows(TrackingStore(registry.uri), NAME)[-1]["bytes"] is None


def test_file_faults_of_the_library_of_a_store_are_one_line() -> None:
    store = TrackingStore("sqlite:///absent.db")
    with pytest.raises(TrackingError, match="no libjvm") as raised, file_faults(store, "models:/a/1"):
        raise OSError("no libjvm\ndlopen failed\n" * 50)
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(RunError, match="TMPDIR"), file_faults(store, "models:/a/1"):
        raise OSError(28, "No space left on device")

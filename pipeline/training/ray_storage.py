"""The storage of a run as Ray 2.60 hands it to a worker: private parts of Ray that saving a checkpoint needs.

They are here and not in `launch/ray_internals.py`, because training may not import launch. pyproject.toml pins Ray
(`ray>=2.60,<2.61`); check this file for a newer one.
"""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # importing this module does not import Ray
    from ray.train import Checkpoint


class RunStorage(Protocol):
    """The part of Ray's StorageContext that is used here."""

    storage_filesystem: Any  # a pyarrow file system

    def persist_current_checkpoint(self, checkpoint: "Checkpoint", checkpoint_dir_name: str) -> "Checkpoint":
        """Copy a local checkpoint into the run's folder, and return the copy."""

    def build_checkpoint_path_from_name(self, checkpoint_name: str) -> str:
        """The path of a checkpoint in the file system."""


def current_storage() -> RunStorage:
    """The storage of the run that this worker belongs to."""
    import ray.train

    storage: RunStorage = ray.train.get_context().get_storage()
    return storage


def copy_checkpoint(storage: RunStorage, local: "Checkpoint", name: str) -> "Checkpoint":
    """Copy `local` into the run's folder as `name`. Raises whatever the file system raises."""
    return storage.persist_current_checkpoint(local, name)


def delete_checkpoint(storage: RunStorage, name: str) -> None:
    """Delete checkpoint `name`, complete or not. Raises whatever the file system raises."""
    storage.storage_filesystem.delete_dir(storage.build_checkpoint_path_from_name(name))


def is_storage_not_shared(error: Exception) -> bool:
    """Whether Ray refused a copy because this node does not see the marker file that the driver has written."""
    return isinstance(error, RuntimeError) and "cluster storage" in str(error)

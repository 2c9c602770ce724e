"""Private parts of Ray 2.60 that only tests need; those of the project are in `pipeline.launch.ray_internals`."""

from typing import Any

from ray._private.ray_logging import global_worker_stdstream_dispatcher as output_dispatcher
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

__all__ = [
    "CheckpointManager",
    "CheckpointManagerInitializationError",
    "StorageContext",
    "WorkerHealthCheckFailedError",
    "list_reported",
    "output_dispatcher",
    "prepare_config",
    "validate_config",
]


def list_reported(manager: CheckpointManager) -> list[Any]:
    """The checkpoints that Ray knows, the best one last."""
    return list(manager._checkpoint_results)

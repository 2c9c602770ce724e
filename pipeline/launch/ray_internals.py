"""Everything outside the public interface of Ray that this project depends on: formats, texts, names, attributes.

Known version: Ray 2.60, to which pyproject.toml pins it (`ray>=2.60,<2.61`). For a newer Ray, check this file first. It
holds facts only; its callers decide what to do about them. Three are needed in lower rooms and live there: the name of
the checkpoint list (`runs/record.py`), the storage of a checkpoint (`training/ray_storage.py`) and what Ray does at
SIGTERM (`signals.py`). Importing this module does not import Ray. A damaged checkpoint list is a ValueError, KeyError
or TypeError.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

# Printed lines of one process: `lines`, `pid`, `ip`, `is_err`, `actor_name`, `task_name`.
Batch = dict[str, Any]
OutputHandler = Callable[[Batch], None]

OUTPUT_HANDLER = "ray_print_logs"  # the name under which Ray registers its own handler, and removes it at shutdown
AUTOSCALER_PID = "autoscaler"  # stands for the process id in the batches of the autoscaler
# Ray's C++ code reports its own actors and resource requests in lines that users cannot act on.
NOISE = r"PreemptionWatcher|Failed to send resource request for"
# How Ray's messages about the death of a worker begin.
DEATH = (
    r"A worker died or was killed while executing|Graceful shutdown of backend failed"
    r"|\t(class_name|actor_id|pid|name|namespace|ip): |The actor is dead because"
)
BEFORE_TRACEBACK = "Error in training function:"  # the line that Ray prints before a worker's traceback
UPLOADED_FOLDER = "/runtime_resources/working_dir_files/"  # where Ray unpacks the working folder of a submitted job
# A resource of which every head node offers 1.0; a share of it places a task on the head node.
HEAD_RESOURCE = "node:__internal_head__"
WORKER_TITLE = "ray::RayTrainWorker"  # titles of processes, as `ps` shows them
CONTROLLER_TITLE = "ray::TrainController"
ROUTINE_LOGGER = "ray._private.authentication.authentication_token_setup"  # logs at every connection


@dataclass(frozen=True)
class CheckpointList:
    """Ray Train's list of a run's checkpoints."""

    metrics: dict[str, dict[str, Any]]  # what was reported with each checkpoint, by the name of its folder
    pending: dict[str, Any]  # Ray's settings of evaluation tasks that have not ended, by checkpoint


def parse_checkpoint_list(content: bytes) -> CheckpointList:
    """Parse the file `runs.record.CHECKPOINT_LIST`.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
    """
    document = json.loads(content)
    metrics = {entry["checkpoint_dir_name"]: entry["metrics"] for entry in document["checkpoint_results"]}
    latest = document["latest_checkpoint_result"]
    if latest is not None and latest["checkpoint_dir_name"] not in metrics:
        raise ValueError("the newest checkpoint is not among the others")
    names = [entry["checkpoint_dir_name"] for entry in document.get("pending_training_results", ())]
    specs = document.get("pending_validation_specs", ())
    return CheckpointList(metrics, dict(zip(names, specs, strict=False)))


def format_checkpoint_list(content: CheckpointList, score: str) -> bytes:
    """The file that Ray reads when a run continues.

    Args:
        content: checkpoints in the order of their reports.
        score: the metric by which Ray ranks them.
    """
    results: dict[str, dict[str, Any]] = {
        name: {"version": 0, "checkpoint_dir_name": name, "metrics": metrics}
        for name, metrics in content.metrics.items()
    }
    order = [*content.metrics]
    ranked = sorted(order, key=lambda name: (content.metrics[name][score], order.index(name)))
    pending = [name for name in order if name in content.pending]
    document = {
        "ray_version": version("ray"),
        "checkpoint_results": [results[name] for name in ranked],
        "checkpoint_report_indices": [order.index(name) for name in ranked],
        "latest_checkpoint_result": results[order[-1]] if order else None,
        "pending_training_results": [results[name] for name in pending],
        "pending_validation_specs": [content.pending[name] for name in pending],
        "current_report_index": len(order),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    return json.dumps(document).encode()


def unwrap_failure(error: BaseException) -> BaseException:
    """The error that Ray's health check of a worker met; any other error as it is."""
    found: BaseException = getattr(error, "health_check_failure", error)
    return found


def list_failures(error: BaseException) -> Mapping[int, BaseException]:
    """The errors behind a TrainingFailedError: those of workers by rank, or the controller's as rank 0."""
    return dict(getattr(error, "worker_failures", {})) or {0: getattr(error, "controller_failure", error)}


def find_output_handler() -> OutputHandler | None:
    """Ray's own handler of worker output in this process; None if Ray sends no output to this process."""
    handlers: Mapping[str, OutputHandler] = dict(_dispatcher().handlers)
    return handlers.get(OUTPUT_HANDLER)


@contextmanager
def replace_output_handler(handler: OutputHandler) -> Iterator[None]:
    """Inside the `with` block, worker output goes to `handler` instead of Ray's own handler, which must exist."""
    dispatcher, own = _dispatcher(), find_output_handler()
    assert own is not None, "the caller has asked find_output_handler"
    dispatcher.remove_handler(OUTPUT_HANDLER)
    dispatcher.add_handler(OUTPUT_HANDLER, handler)  # under Ray's name, so that `ray.shutdown` removes it
    try:
        yield
    finally:
        if any(each is handler for _, each in dispatcher.handlers):
            dispatcher.remove_handler(OUTPUT_HANDLER)
            dispatcher.add_handler(OUTPUT_HANDLER, own)


def is_noise(line: str) -> bool:
    """Whether a line of output is one of Ray's that users cannot act on."""
    return re.search(NOISE, line) is not None


def is_death_report(line: str) -> bool:
    """Whether a line of output is part of Ray's report of a worker that died."""
    return re.match(DEATH, line) is not None


def running_serve_options() -> Any:
    """The `HTTPOptions` of the Ray Serve that runs on the cluster; None if there is none. `serve.status` lacks them."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config


def _dispatcher() -> Any:
    from ray._private.ray_logging import global_worker_stdstream_dispatcher

    return global_worker_stdstream_dispatcher

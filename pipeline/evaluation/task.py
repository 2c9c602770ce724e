"""Evaluation beside the training: Ray Train starts a task per checkpoint, with its own resources.

Ray's validation tasks (`ValidationConfig`, alpha) keep a checkpoint until it was scored, and choose the best by the
result. They also restart evaluations that a driver did not finish. In Ray 2.60 a validation task whose process dies
ends the whole run, because the controller only handles exceptions raised by the function. Ray therefore starts a
zero-CPU supervisor on the driver's node. The supervisor runs the evaluation in a second task (`scoring.py`) and turns
any failure into a warning. This module imports no torch, because the supervisor only waits.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import ray.train
from ray.exceptions import RayError, TaskCancelledError
from ray.train import ValidationConfig, ValidationTaskConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import Config, dump
from pipeline.logs import get_logger, log_to_driver
from pipeline.runs.evaluations import Entry, Evaluation, Writer, store
from pipeline.runs.record import read_record

log = get_logger("evaluation")
POLL_SECONDS = 2.0  # between two checks whether the run has stopped
RETRIES = 3  # after the death of an evaluation's process or node, because a checkpoint is evaluated only once


def validation_config(config: Config, folder: str, run_id: str | None, control: Writer) -> ValidationConfig:
    """Ray's settings for the run in `folder`; supervisors run on the caller's node, as the controller does."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ValidationConfig(
        Validator(dump(config), folder, run_id, control),
        task_config=ValidationTaskConfig(timeout_s=60 * config.evaluation.task_minutes),
        ray_remote_kwargs={"num_cpus": 0, "scheduling_strategy": here},
    )


@dataclass(frozen=True)
class Validator:
    """The supervisor, which Ray calls with a checkpoint; fields as in `scoring.score`."""

    config: dict[str, Any]
    folder: str
    run_id: str | None
    control: Writer  # handle of the ControlChannel, which writes the result into `evaluations.json`

    def __call__(self, checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
        """The checkpoint's COCO numbers; an empty dictionary, and a warning, if it cannot be evaluated.

        Raises:
            TaskCancelledError: the run has stopped; Ray restarts the evaluation when the run continues.
        """
        log_to_driver()
        name = checkpoint.path.rpartition("/")[2]
        found = supervise(lambda: EvaluationTask(self, name), name, lambda: has_stopped(self.folder))
        if found is None:
            return {}
        row = Evaluation(name, found)
        store(self.control, row)
        return row.metrics


class Task(Protocol):
    """Work in another process."""

    def wait(self, seconds: float) -> bool:
        """Wait for at most `seconds`; whether the work has ended, with or without an error."""

    def result(self) -> Entry:
        """The result. Raises the error of the work."""

    def cancel(self) -> None:
        """End the work."""


class EvaluationTask:
    """`scoring.score` as a Ray task with the resources of one worker; it starts at once."""

    def __init__(self, validator: Validator, name: str) -> None:
        scaling = validator.config["scaling"]
        task = ray.remote(
            num_cpus=scaling["cpus_per_worker"],
            num_gpus=1 if scaling["use_gpu"] is True else 0,
            max_calls=1,  # the process ends after it, which frees its memory
            max_retries=RETRIES,
        )
        self._reference = task(evaluate).remote(validator.config, validator.folder, validator.run_id, name)

    def wait(self, seconds: float) -> bool:
        """See Task."""
        return bool(ray.wait([self._reference], timeout=seconds)[0])

    def result(self) -> Entry:
        """See Task."""
        found: Entry = ray.get(self._reference)
        return found

    def cancel(self) -> None:
        """See Task."""
        ray.cancel(self._reference, force=True)


def supervise(start: Callable[[], Task], name: str, stopped: Callable[[], bool]) -> Entry | None:
    """Start a task and wait for it; returns its result, or None, and a warning, if it failed.

    Args:
        start: starts the evaluation of checkpoint `name`.
        name: for the warning.
        stopped: whether the run has stopped in the meantime.

    Raises:
        TaskCancelledError: the run has stopped.
    """
    try:
        task = start()
        while not task.wait(POLL_SECONDS):
            if stopped():
                task.cancel()
                raise TaskCancelledError(error_message=f"the run has stopped; {name} is evaluated when it continues")
        return task.result()
    except TaskCancelledError:
        raise
    except Exception as error:
        cause = getattr(error, "cause", None) if isinstance(error, RayError) else None
        log.warning(
            "%s could not be evaluated, training continues without its AP: %s",
            name,
            str(cause or error).strip() or repr(error),
        )
        return None


def has_stopped(folder: str) -> bool:
    """Whether the run's workers have stopped early; False if its record cannot be read."""
    try:
        return bool(read_record(folder).stopped)
    except Exception:  # each store raises its own errors; the next poll reads the record again
        return False


def evaluate(config: dict[str, Any], folder: str, run_id: str | None, name: str) -> Entry:
    """Call `scoring.score` after setting up logging; torch is imported here and not at the top."""
    log_to_driver(logging.WARNING)  # results are shown through the ControlChannel
    from pipeline.evaluation.scoring import score

    return score(config, folder, run_id, name)

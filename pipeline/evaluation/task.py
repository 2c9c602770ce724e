"""Evaluation beside the training: Ray Train starts a task per checkpoint to evaluate, on resources of its own.

Ray's validation tasks (`ValidationConfig`, alpha) keep a checkpoint until it was scored, choose the best by the result,
and begin again what a driver left behind. A validation task that dies, though, ends the whole run in Ray 2.60: its
controller expects exceptions of the function alone. So Ray's task is a watchman that needs no resources and stays
beside the controller; it starts the evaluation as a task of its own (`scoring.py`) and makes a warning of every fault.
Set up by `driver.py`. Imports no torch: the watchman only waits.
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

log = get_logger("validating")
LOOK_SECONDS = 2.0  # between two looks at whether the run was told to leave
RETRIES = 3  # of an evaluation whose process or node died: a checkpoint that has lost its AP is not found again


def validation_config(config: Config, folder: str, run_id: str | None, control: Writer) -> ValidationConfig:
    """Ray's settings for the run in `folder`; the caller's node is the one that the controller runs on."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ValidationConfig(
        Validator(dump(config), folder, run_id, control),
        task_config=ValidationTaskConfig(timeout_s=60 * config.evaluation.task_minutes),
        ray_remote_kwargs={"num_cpus": 0, "scheduling_strategy": here},
    )


@dataclass(frozen=True)
class Validator:
    """What Ray calls with a checkpoint; fields as in `scoring.score`."""

    config: dict[str, Any]
    folder: str
    run_id: str | None
    control: Writer  # who writes the result down

    def __call__(self, checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
        """The checkpoint's COCO numbers, or nothing (and a warning) if it cannot be evaluated.

        Raises:
            TaskCancelledError: the run was told to leave; Ray begins again when the run goes on.
        """
        log_to_driver()
        name = checkpoint.path.rpartition("/")[2]
        found = watch(lambda: EvaluationTask(self, name), name, lambda: is_leaving(self.folder))
        if found is None:
            return {}
        row = Evaluation(name, found)
        store(self.control, row)
        return row.metrics


class Task(Protocol):
    """Work that goes on elsewhere."""

    def wait(self, seconds: float) -> bool:
        """Whether it ended, well or not, within so long."""

    def result(self) -> Entry:
        """What came out. Raises what went wrong."""

    def cancel(self) -> None:
        """End it."""


class EvaluationTask:
    """`scoring.score` as a Ray task with the resources of one worker; started at once."""

    def __init__(self, validator: Validator, name: str) -> None:
        scaling = validator.config["scaling"]
        task = ray.remote(
            num_cpus=scaling["cpus_per_worker"],
            num_gpus=1 if scaling["use_gpu"] is True else 0,
            max_calls=1,  # the process ends, and its memory is free
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


def watch(start: Callable[[], Task], name: str, leaving: Callable[[], bool]) -> Entry | None:
    """What came out of a task; None, and a warning, if it failed.

    Args:
        start: starts the evaluation of checkpoint `name`.
        name: for the warning.
        leaving: whether the run was told to leave meanwhile.

    Raises:
        TaskCancelledError: it was.
    """
    try:
        task = start()
        while not task.wait(LOOK_SECONDS):
            if leaving():
                task.cancel()
                raise TaskCancelledError(error_message=f"the run leaves; {name} is evaluated when it goes on")
        return task.result()
    except TaskCancelledError:
        raise
    except Exception as error:
        cause = getattr(error, "cause", None) if isinstance(error, RayError) else None
        log.warning(
            "%s could not be evaluated, training goes on without its AP: %s",
            name,
            str(cause or error).strip() or repr(error),
        )
        return None


def is_leaving(folder: str) -> bool:
    """Whether the run's workers have left before its end; no, if its record cannot be read just now."""
    try:
        return bool(read_record(folder).stopped)
    except Exception:  # each store has its own family of errors, and the next look will tell
        return False


def evaluate(config: dict[str, Any], folder: str, run_id: str | None, name: str) -> Entry:
    """`scoring.score` with this process's logging set up; torch is imported here and not above."""
    log_to_driver(logging.WARNING)  # results are told to the control
    from pipeline.evaluation.scoring import score

    return score(config, folder, run_id, name)

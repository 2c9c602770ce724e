"""Saving checkpoints: written on rank 0's node, uploaded into the run's storage by Ray Train, and committed.

All ranks call `Saver.save`; rank 0 writes the files. Training continues after the upload (`sync`) or during it
(`async`). In both cases one checkpoint is committed before the next is reported. Otherwise a checkpoint that Ray's
controller has not registered would be lost when the worker dies. A storage that is full or cannot be written is a
StorageError that names it. Earlier checkpoints stay, and a half-written one is removed if the storage allows it.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.errors import storage_error
from pipeline.evaluation.coco import METRICS
from pipeline.files.retry import call_with_retries
from pipeline.files.scratch import Scratch
from pipeline.files.storage import is_url, join
from pipeline.runs.evaluations import Entry, Evaluation
from pipeline.runs.record import PREFIX
from pipeline.runtime import Runtime
from pipeline.tracking.logger import RunLogger
from pipeline.training.ray_storage import (
    RunStorage,
    copy_checkpoint,
    current_storage,
    delete_checkpoint,
    is_storage_not_shared,
)

if TYPE_CHECKING:  # the check of a resume uses `report_metrics` and must not load Ray
    from ray.train import Checkpoint

SCORE = "val/AP"  # the metric by which Ray decides which checkpoints to keep
NO_AP = -1.0  # reported for weights that were not evaluated, because Ray ranks all checkpoints by a number
STOPPED = "stopped"  # key in the report of a run that was asked to stop; its value is the reason
MANIFEST = "checkpoints.json"  # MLflow artifact that lists the existing checkpoints


class Saver:
    """Saves the checkpoints of one rank."""

    def __init__(self, runtime: Runtime, logger: RunLogger, run_folder: str, upload: str) -> None:
        self._runtime = runtime
        self._logger = logger
        self._folder = run_folder
        from ray.train import CheckpointUploadMode

        self._mode = CheckpointUploadMode.ASYNC if upload == "async" else CheckpointUploadMode.SYNC
        self._pending = False

    def save(
        self,
        state: TrainState,
        weights: dict[str, Tensor],
        moments: dict[str, Tensor],
        average: dict[str, Tensor] | None,
        metrics: Mapping[str, Any],
        entry: Entry | None = None,
        validate: bool = False,
    ) -> None:
        """Save a checkpoint; all ranks must call it.

        Args:
            state: position in the run.
            weights: of the model.
            moments: of the optimizer.
            average: of the weights, if the run keeps one.
            metrics: further values for Ray's report.
            entry: the evaluation of these weights, if they were evaluated.
            validate: whether Ray starts a task that evaluates the checkpoint, see `pipeline.evaluation.task`.

        Raises:
            StorageError: it cannot be written here or in the run's storage.
        """
        import ray.train

        self.commit()
        self._logger.flush()  # metrics up to here are not logged again after a resume
        stored = upload = None
        if self._runtime.is_main:
            scratch = Scratch("checkpoint")
            try:
                checkpoint.save(scratch.folder, state, weights, moments, average)
            except BaseException:
                scratch.close()
                raise
            stored = ray.train.Checkpoint.from_directory(scratch.folder)
            upload = Upload(self._folder, current_storage(), scratch)
        # Not the name of an earlier attempt, which Ray may still list.
        name = f"{PREFIX}{state.global_step:08d}_{uuid.uuid4().hex[:8]}"
        ray.train.report(
            {**report_metrics(state, Evaluation(name, entry) if entry else None), **metrics},
            checkpoint=stored,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=self._mode,
            delete_local_checkpoint_after_upload=False,  # `Upload` deletes it, also after a failed upload
            checkpoint_upload_fn=upload,
            validation=validate,
        )
        self._pending = True
        if self._mode is ray.train.CheckpointUploadMode.SYNC:
            self.commit()

    def commit(self) -> None:
        """Wait until Ray has registered the last checkpoint, and log the list of existing ones in MLflow."""
        if self._pending:
            known = _registered_checkpoints()
            self._pending = False
            write_manifest(self._logger, self._folder, [(each.checkpoint.path, each.metrics) for each in known])


def is_evaluation_pending(step: int) -> bool:
    """Whether a task evaluates, or is about to evaluate, the checkpoint of optimizer step `step`."""
    from ray.train import ReportedCheckpointStatus

    known = _registered_checkpoints()
    pending = [each for each in known if each.status is ReportedCheckpointStatus.PENDING_VALIDATION]
    return any(each.metrics.get("global_step") == step for each in pending)


def _registered_checkpoints() -> list[Any]:
    from ray.train import CheckpointConsistencyMode, get_all_reported_checkpoints

    return list(get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED))


class Upload:
    """Copies a checkpoint folder into the run's storage. Ray calls it, in `async` mode from a thread."""

    def __init__(self, run_folder: str, storage: RunStorage, scratch: Scratch) -> None:
        self._folder = run_folder
        self._storage = storage
        self._scratch = scratch  # the local folder with the checkpoint

    def __call__(self, local: "Checkpoint", name: str) -> "Checkpoint":
        """Returns the copy. Raises StorageError; the local folder is removed in both cases."""
        try:
            if is_url(self._folder):
                return call_with_retries(lambda: copy_checkpoint(self._storage, local, name))
            return copy_checkpoint(self._storage, local, name)
        except Exception as error:  # each store raises its own errors
            self._remove(name)
            raise storage_error(_explain(self._folder, name, error), error) from error
        finally:
            self._scratch.close()

    def _remove(self, name: str) -> None:
        with contextlib.suppress(Exception):  # if this fails, `snapshot.repair` removes it at the next start
            call_with_retries(lambda: delete_checkpoint(self._storage, name))


def report_metrics(state: TrainState, evaluated: Evaluation | None) -> dict[str, Any]:
    """The metrics of a checkpoint in Ray's list: its epoch and step, and its row of `evaluations.json` or NO_AP."""
    scores = evaluated.metrics if evaluated else {f"val/{name}": NO_AP for name in METRICS}
    return {**scores, "epoch": state.epoch, "global_step": state.global_step}


def write_manifest(logger: RunLogger, run_folder: str, known: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Log the list of existing checkpoints, given the path or URL and the reported metrics of each."""
    logger.text(json.dumps(build_manifest(run_folder, known), indent=1), MANIFEST)


def build_manifest(run_folder: str, known: list[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row per checkpoint, newest first: path or URL, epoch, step, and AP if it was evaluated."""
    rows = []
    for path, metrics in sorted(known, key=lambda each: -each[1].get("global_step", -1)):
        row = {"path": join(run_folder, path.rpartition("/")[2])}
        row |= {key: metrics[key] for key in ("epoch", "global_step") if key in metrics}
        rows.append(row | ({SCORE: metrics[SCORE]} if metrics.get(SCORE, NO_AP) > NO_AP else {}))
    return rows


def _explain(folder: str, name: str, error: Exception) -> str:
    earlier = "earlier checkpoints are intact, and the same command with --resume continues from the last one"
    if is_storage_not_shared(error):
        kind = "the same store" if is_url(folder) else "a folder that all nodes share (NFS) or a URL (s3://...)"
        return f"storage of run {folder} is not the same on every node: set storage to {kind}; {earlier}"
    reason = getattr(error, "strerror", None) or str(error)
    return f"cannot store {join(folder, name)}: {reason}; free space there or correct the access rights. The {earlier}"

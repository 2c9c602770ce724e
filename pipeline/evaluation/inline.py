"""Evaluation between two training steps: when it is due, its numbers, and its report in MLflow.

Raises what the evaluator raises. A report that cannot be written, or that MLflow does not accept, is a warning.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

from torch import nn

from pipeline.checkpoint import TrainState
from pipeline.config import TrainConfig
from pipeline.evaluation.evaluator import Evaluator, Result
from pipeline.evaluation.report import (
    category_table,
    convergence_plot,
    draw_first_images,
    per_category_ap,
    precision_recall_plot,
)
from pipeline.evaluation.verification.request import Place
from pipeline.evaluation.verification.start import Verification, settle, start_verification
from pipeline.files.scratch import scratch_folder
from pipeline.files.storage import write_bytes
from pipeline.logs import get_logger
from pipeline.runs.evaluations import Entry, History, results_file
from pipeline.tracking.lineage import CLASS_METRIC
from pipeline.tracking.logger import RunLogger

log = get_logger("evaluation")


def is_due(state: TrainState, eval_epochs: int, total_steps: int) -> bool:
    """Whether `state` is at the end of an epoch to evaluate, or at the end of the run."""
    ends_epoch = state.step == 0 and state.epoch > 0 and state.epoch % eval_epochs == 0
    return ends_epoch or state.global_step == total_steps


def is_last(state: TrainState, train: TrainConfig) -> bool:
    """Whether `state` is at the end of the run."""
    return state.epoch >= train.epochs or state.global_step == train.max_steps


def entry_of(state: TrainState, metrics: dict[str, float]) -> Entry:
    """The COCO numbers of the weights of `state`, with their epoch and step."""
    return {"epoch": float(epoch_of(state)), "step": float(state.global_step), **metrics}


def epoch_of(state: TrainState) -> int:
    """The epoch, from 0, that the newest step belongs to."""
    return state.epoch if state.step else state.epoch - 1


class Reporter:
    """Writes evaluations into the MLflow run of a training run: numbers, results file, plots, drawings.

    The results file also stays in the run's `folder` (path or URL), where the end of the run reads it.
    """

    def __init__(self, evaluator: Evaluator, logger: RunLogger, folder: str) -> None:
        self._evaluator = evaluator
        self._folder = folder
        self._logger = logger

    def write(self, result: Result, state: TrainState, history: History, seconds: float) -> None:
        """Log `result`, the newest one of `history`, at the step of the weights of `state`."""
        metrics = {f"val/{name}": value for name, value in result.metrics.items()}
        best = max(entry["AP"] for entry in history)
        by_class = per_category_ap(result.scores)
        classes = {f"{CLASS_METRIC}{category}": ap for category, ap in by_class.items() if ap >= 0}
        metrics |= {"val/AP_best": best, "val/seconds": seconds, **classes}
        self._logger.metrics(metrics, state.global_step)
        name = f"epoch_{epoch_of(state):03d}"
        try:
            with scratch_folder("evaluation") as folder:
                self._write_files(result, state, history, folder, name)
        except Exception as error:  # a full disk, or a plot that fails, must not end the training
            log.warning("the files of the evaluation of %s are incomplete: %s", name, str(error) or repr(error))

    def _write_files(self, result: Result, state: TrainState, history: History, folder: Path, name: str) -> None:
        """Results file, AP per category, plots and drawings of this evaluation as MLflow artifacts."""
        result.detections.to_results_json(folder / f"{name}.json")
        self._keep(folder / f"{name}.json", results_file(self._folder, state.global_step))
        self._logger.artifact(folder / f"{name}.json", "results")
        by_id = {category.id: category.name for category in state.categories}
        table = category_table(result.scores, by_id)
        self._logger.text(json.dumps(table, indent=1), f"results/{name}_categories.json")
        precision_recall_plot(result.scores, folder / f"precision_recall_{name}.png")
        self._logger.artifact(folder / f"precision_recall_{name}.png", "plots")
        convergence_plot(history, folder / "convergence.png")
        self._logger.artifact(folder / "convergence.png", "plots")
        for image_id, image in draw_first_images(result.detections, self._evaluator.loader.data, by_id).items():
            image.save(folder / f"{image_id}.png")
            self._logger.artifact(folder / f"{image_id}.png", f"detections/{name}")

    def _keep(self, file: Path, path: str) -> None:
        try:
            write_bytes(path, file.read_bytes())
        except Exception as error:  # each store raises its own errors; training goes on without this file
            log.warning("the results file %s is not kept: %s", path, str(error).strip() or repr(error))


class InlineEvaluation:
    """Evaluates the run in `folder` between two steps, on all ranks. Its last evaluation is also verified."""

    def __init__(self, evaluator: Evaluator, logger: RunLogger, folder: str) -> None:
        self._evaluator = evaluator
        self._reporter = Reporter(evaluator, logger, folder)
        self._verification: Verification | None = None

    def run(
        self,
        model: nn.Module,
        state: TrainState,
        earlier: History,
        place_of: Callable[[History], Place | None] | None = None,
    ) -> Entry | None:
        """The COCO numbers of `model`, which has the weights of `state`, on rank 0; None on others. A collective.

        Args:
            model: runs in eval mode.
            state: epoch and step of its weights.
            earlier: rows of earlier evaluations.
            place_of: given all rows, where the verdict of pycocotools is recorded; if it is or gives None, nowhere.
        """
        start = time.monotonic()
        result = self._evaluator.run(model)
        if result is None:
            return None
        entry = entry_of(state, result.metrics)
        history = (*earlier, entry)
        if place_of and (place := place_of(history)):
            self._verification = start_verification(result.scores, place)
        self._reporter.write(result, state, history, time.monotonic() - start)
        return entry

    def settle(self) -> None:
        """Report the verdict of the last evaluation, if it comes soon."""
        settle(self._verification)
        self._verification = None

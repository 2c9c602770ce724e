"""The evaluation of a trained model as a whole: find it, evaluate it here or on a cluster, log the result.

Everything that can be wrong with the request is refused before the evaluation starts, with nothing written. Raises
RunError and TrackingError for the model and its MLflow run, ConfigError for settings; errors of the evaluation itself
exit with 1.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import TrainState, load_inference
from pipeline.config import Config, flatten
from pipeline.data.index import ShardIndex
from pipeline.errors import ResourceError, StorageError, after_start
from pipeline.evaluation.class_table import ClassScore, class_scores
from pipeline.evaluation.evaluator import Result
from pipeline.evaluation.verification.request import Place
from pipeline.evaluation.verification.start import verified
from pipeline.files.outputs import check_outputs
from pipeline.files.scratch import scratch_folder
from pipeline.inference.evaluate import evaluate_here, evaluate_on_actors, open_evaluator, set_threads
from pipeline.launch.evaluation_request import VALIDATION, EvaluationRequest
from pipeline.logs import get_logger
from pipeline.registry.locate import checkpoint_folder, find_log_target
from pipeline.tracking.evaluations import LogTarget, log_evaluation

log = get_logger("evaluation")


@dataclass(frozen=True)
class ModelEvaluation:
    """A model's evaluation and what it was made of."""

    result: Result
    config: Config  # with the settings of the evaluation
    state: TrainState  # of the checkpoint
    data: ShardIndex
    split: str  # name of the data
    target: LogTarget | None  # where it is logged; None: nowhere

    @property
    def classes(self) -> list[ClassScore]:
        """Numbers per class, worst first."""
        return class_scores(self.result.scores, {category.id: category.name for category in self.data.categories})

    def save_results(self, path: Path) -> None:
        """Write the detections as COCO results JSON. Raises StorageError."""
        try:
            digest = self.result.detections.to_results_json(path)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}; choose another path") from None
        log.info("%s: %d detections, sha256 %s", path, len(self.result.detections), digest)

    def log(self) -> None:
        """Log numbers, AP per class, results file and data set in MLflow; does nothing without a target.

        Raises:
            TrackingError: MLflow does not answer or refuses.
        """
        if self.target is None:
            return
        step, name = self.state.global_step, f"{self.split}_step_{self.state.global_step}"
        numbers = {f"{self.split}/{key}": value for key, value in self.result.metrics.items()}
        numbers |= {f"{self.split}/AP_class/{row.id}": row.AP for row in self.classes if row.AP >= 0}
        with scratch_folder("evaluation") as folder, after_start():
            digest = self.result.detections.to_results_json(folder / f"{name}.json")
            document = json.dumps(self._describe(digest), indent=1)
            (folder / f"{name}_evaluation.json").write_text(document, encoding="utf-8")
            log_evaluation(self.target, self.split, step, numbers, self.data, folder)
        log.info("logged %s/AP and the results in %s", self.split, self.target.shown)

    def _describe(self, results_sha256: str) -> dict[str, Any]:
        settings = flatten(self.config)
        return {
            "metrics": self.result.metrics,
            "classes": [asdict(row) for row in self.classes],
            "step": self.state.global_step,
            "results_sha256": results_sha256,
            "data_digest": self.data.digest,
            "settings": {key: settings[key] for key in settings if key.startswith(("data.", "evaluation."))},
        }


def evaluate_model(request: EvaluationRequest, outputs: Sequence[Path] = ()) -> ModelEvaluation:
    """Evaluate a run's best checkpoint, a registered version or a checkpoint over `data.val`.

    Args:
        request: from `evaluation_request.check_request`.
        outputs: files that will be written, which must be possible; all differ.

    Raises:
        InputError: wrong input; nothing was started.
        PipelineError: the evaluation failed.
    """
    target = find_log_target(request.model, request.tracking_uri) if request.log else None
    # An alias may move meanwhile; the numbers must be those of the version that gets them.
    model = f"models:/{target.name}/{target.version}" if target and target.name else request.model
    with checkpoint_folder(model, request.tracking_uri) as folder:
        check_outputs(outputs, [folder])
        inference = load_inference(folder)
    config = request.apply(inference.config)
    start = time.monotonic()
    if request.on_actors:
        from pipeline.launch.cluster import check_resources, resolve_gpu, start_ray  # Ray takes seconds
        from pipeline.launch.worker_output import filter_output

        evaluator = open_evaluator(config, inference, "cpu")
        start_ray()
        scaling = resolve_gpu(config.scaling)
        check_resources(scaling)
        with after_start(), filter_output():
            result = evaluate_on_actors(evaluator, inference, config, scaling)
    else:
        device = choose_device(config)
        if device == "cpu" and request.fixes_threads:
            set_threads(config.scaling)
        evaluator = open_evaluator(config, inference, device)
        with after_start():
            result = evaluate_here(evaluator, inference, config)
    workers = f"{config.scaling.num_workers} workers" if request.on_actors else "one process"
    log.info("evaluated %d images on %s in %.1f s", evaluator.loader.images, workers, time.monotonic() - start)
    split = request.split or VALIDATION
    place = Place(step=inference.state.global_step, split=split)
    if target:
        place = replace(place, run_id=target.run_id, tracking_uri=target.store.uri)
    with after_start():
        result = replace(result, scores=verified(result.scores, place))
    return ModelEvaluation(result, config, inference.state, evaluator.loader.index, split, target)


def choose_device(config: Config) -> str:
    """The device of an evaluation in this process. Raises ResourceError if there is no GPU and one is required."""
    if config.scaling.use_gpu is True and not torch.cuda.is_available():
        raise ResourceError("scaling.use_gpu is true but no CUDA device is visible; set scaling.use_gpu=false")
    return "cuda" if config.scaling.use_gpu is not False and torch.cuda.is_available() else "cpu"

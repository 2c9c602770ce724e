"""The analysis that `jobs.analyse` makes: detections of models or results files, the page, its files in MLflow.

What is wrong with a model, its data or a results file is an InputError before a model runs. An MLflow store that does
not take the files is a warning, because they are in the folder.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import __version__
from pipeline.checkpoint import Inference, load_inference
from pipeline.config import Config, override
from pipeline.data.dataset import DetectionDataset
from pipeline.data.loader import open_dataset
from pipeline.data.plan import evaluated_samples
from pipeline.errors import ConfigError, DetectionError, PipelineError, StorageError, after_start
from pipeline.evaluation.analysis.analyse import analyse
from pipeline.evaluation.analysis.drawings import reader_of
from pipeline.evaluation.analysis.files import write_analysis
from pipeline.evaluation.analysis.queries import BestClass
from pipeline.evaluation.analysis.result import Analysis
from pipeline.evaluation.coco import file_names, ground_truth, ground_truth_of_file
from pipeline.evaluation.detections import Detections, from_results_json
from pipeline.evaluation.evaluator import PUBLISHED_TOP_K
from pipeline.inference.evaluate import evaluate_here, open_evaluator
from pipeline.launch.analysis_request import AnalysisRequest, is_results
from pipeline.launch.evaluation_request import check_request
from pipeline.launch.model_evaluation import choose_device, evaluate_model
from pipeline.logs import get_logger
from pipeline.registry.locate import checkpoint_folder, find_log_target
from pipeline.tracking.evaluations import LogTarget
from pipeline.tracking.logger import REPORT_SECONDS, RunLogger

ARTIFACTS = "analysis"
QUERY_MODELS = ("deformable_detr", "detr")

log = get_logger("analysis")


@dataclass(frozen=True)
class Written:
    """What was made."""

    analysis: Analysis
    page: Path
    logged: str  # where MLflow has the files; empty if it has none


@dataclass(frozen=True)
class _Truth:
    """Ground truth, with images or without."""

    name: str
    objects: dict[str, Any]  # as for `coco.coco_scores`
    shards: DetectionDataset | None
    images: list[int]  # ids of those that are analysed


def run_analysis(request: AnalysisRequest) -> Written:
    """Evaluate models, analyse, write the folder, log it in MLflow if the target has a run there.

    Args:
        request: from `analysis_request.check_request`.

    Raises:
        InputError: a model, data or results file does not exist or does not fit.
        StorageError: the folder cannot be written.
    """
    named = _read_truth(request, None) if request.annotations else None
    names = file_names(named.objects) if named else {}
    files = {side: from_results_json(Path(side), names) for side in request.sides if is_results(side)}
    with ExitStack() as stack:
        # Folders from here on: an alias may move meanwhile, and files of a server are fetched once.
        models = {
            side: stack.enter_context(checkpoint_folder(side, request.tracking_uri))
            for side in request.sides
            if side not in files
        }
        target = _find_target(request) if request.target in models else None  # the model exists, so a fault is MLflow's
        loaded = {side: load_inference(folder) for side, folder in models.items()}
        configs = {side: _config_of(each, models[side], request) for side, each in loaded.items()}
        first = next(iter(configs.values()), None)
        truth = named or _read_truth(request, first)
        for side, each in loaded.items():
            _check_categories(side, each, truth)
        del loaded  # the evaluations load their own
        found = {side: _check_file(side, detections, truth) for side, detections in files.items()}
        overrides = list(request.overrides)
        if first is not None:  # all models see the images of the first one
            limit = json.dumps(first.evaluation.max_images)
            overrides += [f"data.val={first.data.val}", f"evaluation.max_images={limit}"]
        with after_start():
            found |= {side: _detect(folder, overrides) for side, folder in models.items()}
            queries = None
            if request.target in models:
                queries = _detect_queries(models[request.target], configs[request.target], overrides)
    with after_start():
        against = found[request.against] if request.against else None
        ours, images = found[request.target], truth.images
        analysis = analyse(truth.objects, ours, images, against=against, queries=queries, draws=request.draws)
        title, read = f"Analysis of {request.target}", None if truth.shards is None else reader_of(truth.shards)
        try:
            paths = write_analysis(request.folder, analysis, title, _about(request, truth), read)
        except OSError as error:
            raise StorageError(f"cannot write {request.folder}: {error.strerror}; choose another --out") from None
    return Written(analysis, paths[0], _log(target, paths) if target else "")


def _config_of(loaded: Inference, folder: Path, request: AnalysisRequest) -> Config:
    """A model's config with the settings of this evaluation."""
    return check_request(str(folder), request.overrides).apply(loaded.config)


def _check_categories(side: str, loaded: Inference, truth: _Truth) -> None:
    if truth.shards is not None and truth.shards.index.categories != loaded.categories:
        raise ConfigError(f"{truth.name} has other categories than {side} was trained on; set data.val")


def _find_target(request: AnalysisRequest) -> LogTarget | None:
    try:
        return find_log_target(request.target, request.tracking_uri)
    except PipelineError as error:
        log.warning("the analysis is not logged in MLflow: %s", error)
        return None


def _read_truth(request: AnalysisRequest, first: Config | None) -> _Truth:
    """The data of the first model, else what the arguments name."""
    if first is None and request.shards is None:
        assert request.annotations is not None, "checked in `check_request`"
        objects = ground_truth_of_file(request.annotations)
        return _Truth(str(request.annotations), objects, None, [image["id"] for image in objects["images"]])
    config = first or override(Config(), list(request.overrides))
    data = open_dataset(config.data.val, "data.val", config.data, 1)
    rows = evaluated_samples(len(data), config.evaluation.max_images)
    return _Truth(data.index.folder, ground_truth(data), data, data.index.samples.image_id[rows].tolist())


def _check_file(side: str, detections: Detections, truth: _Truth) -> Detections:
    """Results of the images that are analysed. Raises DetectionError for results of other data."""
    images, categories = ([each["id"] for each in truth.objects[key]] for key in ("images", "categories"))
    try:
        detections.check_and_sort(images, categories)
    except DetectionError as error:
        raise DetectionError(f"{side}, with {truth.name}: {error}") from None
    return detections[np.isin(detections.image_ids, truth.images)]


def _detect(folder: Path, overrides: Sequence[str]) -> Detections:
    detections = evaluate_model(check_request(str(folder), overrides)).result.detections
    return detections[detections.orders < PUBLISHED_TOP_K]


def _detect_queries(folder: Path, config: Config, overrides: Sequence[str]) -> Detections | None:
    """The model's detections with one class of each query; None for a model without queries."""
    if config.model.name not in QUERY_MODELS:
        return None
    views = {"scales": (), "flip": False, "top_k": config.model.queries}
    config = override(config, list(overrides))
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=views)})
    inference = load_inference(folder)
    evaluator = open_evaluator(config, inference, choose_device(config))
    return evaluate_here(evaluator, inference, config, BestClass).detections


def _about(request: AnalysisRequest, truth: _Truth) -> list[tuple[str, str]]:
    facts = [("Of", request.target), ("Data", truth.name)]
    whole = len(truth.objects["images"])
    if len(truth.images) < whole:
        facts.append(("Subset", f"{len(truth.images):,} of {whole:,} images: a quick look, not the AP of the data"))
    if request.against:
        facts.append(("Compared with", request.against))
    if request.overrides:
        facts.append(("Settings", " ".join(request.overrides)))
    return [*facts, ("Version", __version__)]


def _log(target: LogTarget, paths: Sequence[Path]) -> str:
    """Copy the files into the MLflow run; returns where they are, or nothing, and a warning."""
    place = f"{ARTIFACTS}/{paths[0].parent.resolve().name}"
    with RunLogger(target.store.uri, target.run_id) as logger:
        for path in paths:
            logger.artifact(path, place)
        written = logger.flush(REPORT_SECONDS)
    return f"{place} of {target.shown}" if written else ""

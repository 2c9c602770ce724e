"""The report of a finished run: the analysis of its best evaluation as a page, numbers in MLflow, a table of classes.

It reads the results file that the run has kept, so it does not matter where the evaluation ran. A failure is a warning,
because the run itself has succeeded.
"""

from pathlib import Path

from pipeline import __version__
from pipeline.config import Config, from_record
from pipeline.data.loader import open_dataset
from pipeline.data.plan import evaluated_samples
from pipeline.evaluation.analysis.analyse import analyse
from pipeline.evaluation.analysis.classes import table_of_classes
from pipeline.evaluation.analysis.drawings import reader_of
from pipeline.evaluation.analysis.files import write_analysis
from pipeline.evaluation.analysis.result import PAGE, Analysis
from pipeline.evaluation.coco import ground_truth
from pipeline.evaluation.detections import from_results_json
from pipeline.evaluation.evaluator import PUBLISHED_TOP_K
from pipeline.files.scratch import scratch_folder
from pipeline.files.storage import exists, is_url, join, local_copy, write_bytes
from pipeline.logs import get_logger
from pipeline.runs.evaluations import SUBSET, Evaluation, results_file
from pipeline.runs.record import RunRecord, best_evaluation
from pipeline.tracking.lineage import CLASS_METRIC, F1_METRIC, THRESHOLD_METRIC
from pipeline.tracking.logger import REPORT_SECONDS, RunLogger

FOLDER = "analysis"  # in the run's folder and among the run's artifacts
SHOWN_CLASSES = 20  # of the table for the terminal

log = get_logger("report")


def report_run(record: RunRecord) -> str:
    """Write the page, log it and the numbers in MLflow; returns the table of classes and the page's path as text.

    Args:
        record: of a finished run.

    Returns:
        An empty text, and a warning, if there is no report.
    """
    try:
        best = best_evaluation(record)
        if best is None:
            log.warning("run %s has no report: none of its checkpoints was evaluated", record.name)
            return ""
        results = results_file(record.folder, best.entry["step"])
        if not exists(results):
            log.warning("run %s has no report: there is no %s", record.name, results)
            return ""
        analysis, page = _write(record, best, results)
    except Exception as error:  # stores, MLflow, matplotlib, a full disk
        log.warning("the report of run %s is incomplete: %s", record.name, str(error).strip() or repr(error))
        return ""
    return f"classes on validation, lowest AP first (analysis: {page})\n{table_of_classes(analysis, SHOWN_CLASSES)}"


def numbers_of(analysis: Analysis) -> dict[str, float]:
    """The numbers of an analysis that MLflow shows as metrics: AP, threshold and F1 of each class, and of all."""
    best = analysis.thresholds.best
    numbers = {"val/threshold": best.threshold, "val/F1": best.f1}
    for each in analysis.categories:
        if each.ap.value >= 0:
            numbers |= {f"{CLASS_METRIC}{each.id}": each.ap.value, f"{F1_METRIC}{each.id}": each.best.f1}
            numbers |= {f"{THRESHOLD_METRIC}{each.id}": each.best.threshold} if each.best.f1 else {}
    return numbers


def _write(record: RunRecord, best: Evaluation, results: str) -> tuple[Analysis, str]:
    config = from_record(record.config, record.folder)
    data = open_dataset(config.data.val, "data.val", config.data, 1)
    limit = int(best.entry[SUBSET]) if SUBSET in best.entry else None
    images = data.index.samples.image_id[evaluated_samples(len(data), limit)]
    with local_copy(results) as file:
        detections = from_results_json(file)
    scored = detections[detections.orders < PUBLISHED_TOP_K]
    analysis = analyse(ground_truth(data), scored, images.tolist())
    with scratch_folder("report") as scratch, RunLogger(config.tracking.uri, record.run_id) as logger:
        folder = scratch if is_url(record.folder) else Path(record.folder) / FOLDER
        title, about = f"Analysis of run {record.name}", _about(best, config, len(data))
        paths = write_analysis(folder, analysis, title, about, reader_of(data))
        logger.metrics(numbers_of(analysis), int(best.entry["step"]))
        for path in paths:
            logger.artifact(path, FOLDER)
        logger.flush(REPORT_SECONDS)
        if is_url(record.folder):
            for path in paths:
                write_bytes(join(record.folder, f"{FOLDER}/{path.name}"), path.read_bytes())
    return analysis, join(record.folder, f"{FOLDER}/{PAGE}")


def _about(best: Evaluation, config: Config, images: int) -> list[tuple[str, str]]:
    facts = [
        ("Checkpoint", f"{best.checkpoint}, epoch {best.entry['epoch'] + 1:.0f}, the one with the highest AP"),
        ("Data", config.data.val),
    ]
    if SUBSET in best.entry:
        facts.append(("Subset", f"{best.entry[SUBSET]:.0f} of {images:,} images: a quick look, not the AP of the data"))
    return [*facts, ("Version", __version__)]

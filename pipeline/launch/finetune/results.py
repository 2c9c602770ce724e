"""What follows the training of a fine-tuning: the test, the registered version, drawings, the report.

Each function reads the finished run and writes into its folder. Faults are those of the commands that do the same
alone; MLflow is needed for the registration only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.data.importing.dataset import TEST
from pipeline.data.index import INDEX
from pipeline.errors import TrackingError
from pipeline.files.atomic import write_file
from pipeline.launch.evaluation_request import check_request
from pipeline.launch.finetune.stages import Stage
from pipeline.logs import get_logger
from pipeline.runs.evaluations import results_file
from pipeline.runs.record import RunRecord, best_evaluation
from pipeline.tracking.store import choose_store, how_to_find, pages

NUMBERS, DETECTIONS = "test.json", "test_detections.json"  # in the run's folder
DRAWINGS = "detections"  # folder in the run's
VERSION = 1

log = get_logger("finetune")


@dataclass(frozen=True)
class Outcome:
    """What the command says at its end."""

    record: RunRecord
    name: str  # of the registered model
    model: str  # models:/NAME@ALIAS, or the run's folder if it has no alias
    test: dict[str, float]  # of the test split; empty without one
    classes: str  # a table, worst first; empty without a test split
    drawings: list[Path]

    def __str__(self) -> str:
        """The end of the command's output: numbers, where things are, and the next commands."""
        record, rows = self.record, []
        if self.test:
            rows += ["classes on test, lowest AP first", self.classes, ""]
        for split, numbers in ((TEST, self.test), ("validation", _plain(record.metrics))):
            if numbers:
                rows.append(f"{split:11} AP {_shown(numbers['AP'])}  AP50 {_shown(numbers['AP50'])}")
        rows.append(f"{'model':11} {self.model}")
        rows.append(f"{'run':11} {record.folder}")
        if self.drawings:
            rows.append(f"{'drawings':11} {self.drawings[0].parent}/*.png")
        tracking = record.config["tracking"]["uri"]
        rows += [f"{'MLflow':11} {pages(tracking)}", "", "next:"]
        where = how_to_find(choose_store(record=record))
        shell = where.removeprefix(" (other commands need ").removesuffix(")")
        rows.append(f"  python -m jobs.predict {self.model} IMAGE... {shell}".rstrip())
        rows.append(f"  python -m jobs.promote {self.name} {shell}".rstrip())
        return "\n".join(rows)


def evaluate_test(record: RunRecord, config: Config) -> None:
    """Evaluate the best checkpoint on the test split: numbers, classes and detections as files, numbers in MLflow."""
    from pipeline.evaluation.class_table import class_table
    from pipeline.launch.model_evaluation import evaluate_model

    shards = test_shards(record)
    request = check_request(record.folder, [f"data.val={shards}"], split=TEST, log=record.run_id is not None)
    folder = Path(record.folder)
    evaluation = evaluate_model(request)
    evaluation.save_results(folder / DETECTIONS)
    document = {"version": VERSION, "metrics": evaluation.result.metrics, "classes": class_table(evaluation.classes)}
    write_file(folder / NUMBERS, json.dumps(document, indent=1).encode())
    try:
        evaluation.log()
    except TrackingError as error:  # the numbers are in the folder
        log.warning("the test is not logged: %s", error)


def register_best(record: RunRecord, config: Config) -> None:
    """Register the best checkpoint; the same checkpoint keeps its version."""
    from pipeline.registry.register import register

    name, alias = registered_name(config), config.tracking.alias
    version = register(record, name, alias)
    log.info("models:/%s/%s%s", name, version, f" is @{alias}" if alias else "")


def draw_test(record: RunRecord, config: Config) -> None:
    """Draw the first test images, ground truth beside detections; without a test split those of validation."""
    from pipeline.data.loader import open_dataset
    from pipeline.evaluation.detections import from_results_json
    from pipeline.evaluation.drawing import save_drawing
    from pipeline.evaluation.report import draw_first_images

    folder = Path(record.folder)
    results, shards = folder / DETECTIONS, test_shards(record)
    if not (shards / INDEX).is_file():
        best = best_evaluation(record)
        if best is None:
            log.warning("run %s has no drawings: none of its checkpoints was evaluated", record.name)
            return
        results, shards = Path(results_file(record.folder, best.entry["step"])), Path(config.data.val)
    data = open_dataset(str(shards), "data.val", config.data, 1)
    names = {category.id: category.name for category in data.index.categories}
    for image_id, image in draw_first_images(from_results_json(results), data, names).items():
        save_drawing(image, folder / DRAWINGS / f"{image_id}.png")


def write_report(record: RunRecord, config: Config) -> None:
    """Write the analysis of the best evaluation as a page, and print its table of classes."""
    from pipeline.launch.run_report import report_run

    if text := report_run(record):
        print(text)


def outcome(record: RunRecord, config: Config) -> Outcome:
    """Read what the stages have left."""
    folder = Path(record.folder)
    document = json.loads((folder / NUMBERS).read_bytes()) if (folder / NUMBERS).is_file() else {}
    name, alias = registered_name(config), config.tracking.alias
    return Outcome(
        record,
        name,
        f"models:/{name}@{alias}" if alias else record.folder,
        document.get("metrics", {}),
        document.get("classes", ""),
        sorted((folder / DRAWINGS).glob("*.png")),
    )


def _plain(metrics: Mapping[str, float]) -> dict[str, float]:
    """The COCO numbers among a run's metrics, without their prefix."""
    return {key.removeprefix("val/"): value for key, value in metrics.items() if key.startswith("val/")}


def _shown(ap: float) -> str:
    return "-" if ap < 0 else f"{ap:.3f}"  # no object in the ground truth


def registered_name(config: Config) -> str:
    """The model that the run becomes a version of."""
    return config.tracking.register_as or config.name


def test_shards(record: RunRecord) -> Path:
    """The folder of the test split's shards, which need not exist."""
    return Path(record.folder) / "data" / TEST


DO: dict[Stage, Callable[[RunRecord, Config], None]] = {
    Stage.TEST: evaluate_test,
    Stage.REGISTRATION: register_best,
    Stage.DRAWINGS: draw_test,
    Stage.REPORT: write_report,
}

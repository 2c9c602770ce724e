"""The evaluators that `benchmarks.evaluation` compares: each package by its own interface, and this project's backends.

A package that is not installed is left out. Each function prepares its input, which is not measured, and returns the
work to be measured: from detections in memory to the 12 numbers.
"""

import contextlib
import io
import json
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ApBackend
from pipeline.evaluation.backends.base import Arrays
from pipeline.evaluation.backends.select import is_installed
from pipeline.evaluation.coco import coco_scores
from pipeline.evaluation.detections import Detections, concatenate

Tree = dict[str, Any]
Rows = NDArray[np.float64]  # [K, 7] as `loadRes` of pycocotools takes an array
Work = Callable[[], Arrays]
PACKAGES = ("pycocotools", "faster-coco-eval", "ultrafast-pycocotools", "vernier", "hotcoco")
OWN = "this project, "


def evaluators() -> list[str]:
    """The names of all evaluators whose package is installed; the reference comes first."""
    backends = [name for name in get_args(ApBackend) if name == "auto" or is_installed(name)]
    return [*filter(is_installed, PACKAGES), *(f"{OWN}{name}" for name in backends if name != "pycocotools")]


def prepare(name: str, truth: Tree, found: Detections, limits: list[int]) -> Work:
    """The work of the evaluator `name`."""
    if name.startswith(OWN):
        backend: Any = name.removeprefix(OWN)
        coco_scores({**truth, "annotations": []}, concatenate([]), backend=backend)  # imports the package
        return lambda: coco_scores(truth, found, backend=backend, limit=limits[-1]).arrays
    numbered = [{"id": number, **entry} for number, entry in enumerate(truth["annotations"], start=1)]
    tree = {**truth, "annotations": numbered, "info": {}}
    boxes, scores = found.boxes_xywh.astype(np.float64), found.scores.astype(np.float64)
    rows = np.column_stack([found.image_ids, boxes, scores, found.category_ids])
    match name:
        case "pycocotools":
            return _pycocotools(tree, rows, limits)
        case "faster-coco-eval":
            return _faster(tree, rows, limits)
        case "ultrafast-pycocotools":
            return _ultrafast(tree, rows, limits)
        case "hotcoco":
            return _hotcoco(tree, rows, limits)
        case "vernier":
            return _vernier(tree, rows, limits)
    raise ValueError(name)


def _pycocotools(tree: Tree, rows: Rows, limits: list[int]) -> Work:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth = COCO()
    truth.dataset = tree
    truth.createIndex()
    return lambda: _run(lambda: COCOeval(truth, truth.loadRes(rows), "bbox"), limits)


def _faster(tree: Tree, rows: Rows, limits: list[int]) -> Work:
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(tree)
    return lambda: _run(lambda: COCOeval_faster(truth, truth.loadRes(rows), "bbox"), limits)


def _ultrafast(tree: Tree, rows: Rows, limits: list[int]) -> Work:
    from ultrafast_pycocotools import COCO, COCOeval

    truth = COCO(tree, verbose=False)
    return lambda: _run(lambda: COCOeval(truth, truth.loadRes(rows), "bbox"), limits)


def _hotcoco(tree: Tree, rows: Rows, limits: list[int]) -> Work:
    from hotcoco import COCO, COCOeval

    truth = COCO(tree)
    return lambda: _run(lambda: COCOeval(truth, truth.load_res(rows), "bbox"), limits)


def _run(make: Callable[[], Any], limits: list[int]) -> Arrays:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = make()
        evaluation.params.maxDets = limits
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result = evaluation.eval
    return Arrays(result["precision"], result["recall"], result["scores"])


def _vernier(tree: Tree, rows: Rows, limits: list[int]) -> Work:
    from vernier.instance import CocoDataset, evaluate_bbox_grid

    sized = {**tree, "images": [{"width": 1, "height": 1, **image} for image in tree["images"]]}
    truth = CocoDataset.from_json(json.dumps(sized).encode())

    def work() -> Arrays:
        grid = evaluate_bbox_grid(truth, rows, parity_mode="strict", max_dets_per_image=limits[-1], use_cats=True)
        result = grid.accumulate(limits)
        result.summarize()
        return Arrays(result.precision, result.recall, result.scores)

    return work

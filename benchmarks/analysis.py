"""`python -m benchmarks.analysis`: processor time and memory of an analysis of 5,000 images x 100 detections."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.cli import CommandParser, Parser, main
from pipeline.evaluation.analysis.analyse import DRAWS, analyse, compare
from pipeline.evaluation.analysis.result import to_json
from pipeline.evaluation.analysis.table import build_table
from pipeline.evaluation.detections import Detections

CATEGORIES, OBJECTS, CROWD = 80, 7.4, 0.012  # of COCO val2017: categories, objects of an image, share of crowd regions
SIDE = 600.0  # pixels


def draw_ground_truth(images: int, random: np.random.Generator) -> dict[str, Any]:
    """Objects with COCO's number, and with categories that are as unequal as COCO's."""
    counts = random.negative_binomial(1, 1 / (1 + OBJECTS), images)
    shares = 1 / np.arange(1, CATEGORIES + 1)
    total = int(counts.sum())
    categories = random.choice(CATEGORIES, total, p=shares / shares.sum()) + 1
    sides = np.exp(random.uniform(np.log(6), np.log(400), (total, 2)))
    corners = random.uniform(0, 1, (total, 2)) * np.maximum(SIDE - sides, 1)
    boxes = np.concatenate([corners, sides], axis=1)
    crowd = random.random(total) < CROWD
    columns = (np.repeat(np.arange(images), counts), categories, boxes, sides.prod(1) * 0.7, crowd.astype(int))
    return {
        "images": [{"id": image} for image in range(images)],
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": iscrowd}
            for image, category, box, area, iscrowd in zip(*(column.tolist() for column in columns), strict=True)
        ],
        "categories": [{"id": k + 1, "name": f"class {k + 1}"} for k in range(CATEGORIES)],
    }


def draw_detections(truth: dict[str, Any], top_k: int, shift: float, seed: int) -> Detections:
    """`top_k` detections of each image: three of most objects, moved by `shift` of their size, the rest anywhere."""
    random = np.random.default_rng(seed)
    images = len(truth["images"])
    own: dict[int, list[dict[str, Any]]] = {image: [] for image in range(images)}
    for annotation in truth["annotations"]:
        own[annotation["image_id"]].append(annotation)
    boxes, categories, scores = np.empty((images, top_k, 4)), np.empty((images, top_k), np.int64), []
    for image, everything in own.items():
        objects = [a for a in everything if random.random() < 0.9]
        near = [objects[k % len(objects)] for k in range(min(top_k, 3 * len(objects)))] if objects else []
        base = np.array([a["bbox"] for a in near]).reshape(-1, 4)
        moved = base + shift * np.tile(base[:, 2:], 2) * random.normal(size=base.shape)
        rest = top_k - len(near)
        sides = np.exp(random.uniform(np.log(6), np.log(400), (rest, 2)))
        boxes[image] = np.concatenate([moved, np.concatenate([random.uniform(0, SIDE, (rest, 2)), sides], axis=1)])
        right = np.array([a["category_id"] for a in near], np.int64)
        swapped = random.random(len(near)) < 0.2
        right[swapped] = random.integers(1, CATEGORIES + 1, int(swapped.sum()))
        categories[image] = np.concatenate([right, random.integers(1, CATEGORIES + 1, rest)])
        logits = np.concatenate([random.normal(-0.5, 1.5, len(near)), random.normal(-4, 1, rest)])
        scores.append(1 / (1 + np.exp(-logits)))
    boxes[..., 2:] = np.abs(boxes[..., 2:])
    order = np.argsort(-np.array(scores), axis=1)
    return Detections(
        np.repeat(np.arange(images), top_k),
        np.tile(np.arange(top_k, dtype=np.int32), images),
        np.take_along_axis(categories, order, 1).ravel(),
        np.take_along_axis(boxes, order[..., None], 1).reshape(-1, 4).astype(np.float32),
        np.take_along_axis(np.array(scores), order, 1).ravel().astype(np.float32),
    )


def measure(name: str, work: Callable[[], object]) -> dict[str, Any]:
    """Wall and processor seconds of `work`, and by how much it raised the highest memory use so far."""
    before, start, peak = time.process_time(), time.perf_counter(), _peak_mib()
    work()
    row = {
        "what": name,
        "processor_s": time.process_time() - before,
        "wall_s": time.perf_counter() - start,
        "more_mib": _peak_mib() - peak,
    }
    print(f"| {name} | {row['processor_s']:.1f} | {row['wall_s']:.1f} | {row['more_mib']:.0f} |", flush=True)
    return row


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser("benchmarks.analysis", __doc__.splitlines()[0], "python -m benchmarks.analysis --images 500")
    parser.add_argument("--images", type=int, default=5000, help="default %(default)s")
    parser.add_argument("--top-k", type=int, default=100, help="detections of an image; default %(default)s")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the bootstrap; default %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure the parts, smallest first, print, save."""
    truth = draw_ground_truth(args.images, np.random.default_rng(0))
    ours, theirs = (draw_detections(truth, args.top_k, shift, seed) for seed, shift in ((1, 0.08), (2, 0.1)))
    print(f"{args.images} images, {len(truth['annotations'])} objects, {len(ours)} detections\n")
    print("| what | processor s | wall s | more MiB |\n|---|---|---|---|")
    rows = [
        measure("sort and overlap", lambda: build_table(truth, ours)),
        measure("all but intervals", lambda: analyse(truth, ours, draws=0)),
        measure(f"with {args.draws} draws, as JSON", lambda: to_json(analyse(truth, ours, draws=args.draws))),
        measure("comparison alone", lambda: compare(truth, ours, theirs, draws=args.draws)),
        measure("analysis and comparison", lambda: analyse(truth, ours, against=theirs, draws=args.draws)),
    ]
    if args.json:
        args.json.write_text(json.dumps({"detections": len(ours), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))

"""`python -m benchmarks.shards ANNOTATIONS IMAGES`: the cost of packing a COCO-format data set.

First it measures the annotations alone, at the size of COCO train2017 (drawn here): parsing, finding the images in a
zip, and planning. Each part gives its CPU time and peak memory, in its own process. Then it times the steps of writing
one image, on the given images. Then it times whole builds with 1 and 2 workers, interleaved; the second worker costs
the start of Ray.
"""

import argparse
import hashlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jobs.cli import CommandParser, Parser, main
from pipeline.data.images import check_decodes
from pipeline.data.sharding.annotations import inspect_coco
from pipeline.data.sharding.image_files import read_image_file
from pipeline.data.sharding.lint import check_headers, examine
from pipeline.data.sharding.shards import build_shards, plan_shards
from pipeline.data.sharding.sources import find_image_files
from pipeline.data.sharding.summary import Summary
from pipeline.data.sharding.verify import verify_shards

COCO_IMAGES = 118_287  # of train2017
BOXES, CROWDS, POINTS = 7.27, 0.012, (6, 60)  # per image; share of crowd; polygon points


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "benchmarks.shards",
        __doc__,
        "python -m benchmarks.shards coco/annotations/instances_val2017.json coco/val2017 --images 2000",
    )
    parser.add_argument("annotations", metavar="ANNOTATIONS")
    parser.add_argument("source", metavar="IMAGES")
    parser.add_argument("--images", type=int, default=2048, help="images of a build; those given are repeated (2048)")
    parser.add_argument("--rounds", type=int, default=3, help="builds for each number of workers; the best counts (3)")
    parser.add_argument("--planned", type=int, default=COCO_IMAGES, help="images of the drawn annotations (118287)")
    parser.add_argument("--plan-only", metavar="FILE", help=argparse.SUPPRESS)  # the process whose memory is measured
    return parser


def draw_annotations(path: Path, images: int) -> None:
    """Annotations of COCO's size and form, written as they are drawn."""
    rng = np.random.default_rng(0)
    entries = [{"id": 3 * k + 1, "file_name": f"{k:012d}.jpg", "width": 640, "height": 480} for k in range(images)]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, 81)]
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        number = 0
        for entry in entries:
            for _ in range(int(rng.poisson(BOXES))):
                number += 1
                crowd = bool(rng.random() < CROWDS)
                x, y, width, height = np.round(rng.uniform((0, 0, 5, 5), (500, 400, 130, 75)), 2).tolist()
                outline = np.round(rng.uniform(0, 480, 2 * int(rng.integers(*POINTS))), 2).tolist()
                mask: Any = {"counts": rng.integers(1, 900, 200).tolist(), "size": [480, 640]} if crowd else [outline]
                annotation = {"segmentation": mask, "area": round(0.6 * width * height, 4), "iscrowd": int(crowd)}
                annotation |= {"image_id": entry["id"], "bbox": [x, y, width, height], "id": number}
                annotation["category_id"] = int(rng.integers(1, 81))
                file.write(", " * (number > 1) + json.dumps(annotation))
        file.write("]}")


def plan_only(path: Path) -> int:
    """Parse, find, plan; prints the CPU seconds of each and the peak memory as JSON."""
    clock = time.process_time()
    spent = {}

    def lap(name: str) -> None:
        nonlocal clock
        spent[name] = time.process_time() - clock
        clock = time.process_time()

    source, findings = inspect_coco(path)
    lap("parse and check")
    files = find_image_files(str(path.with_suffix(".zip")), [image.file_name for image in source.images], findings)
    lap("find in a zip")
    plans = plan_shards([(image, files[image.file_name]) for image in source.images], "x", "out")
    lap("plan")
    print(
        json.dumps({"spent": spent, "shards": len(plans), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})
    )
    return 0


def measure_planning(work: Path, images: int) -> list[str]:
    """Lines about the annotations of a large data set."""
    path = work / "drawn.json"
    draw_annotations(path, images)
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
        for k in range(images):
            archive.writestr(f"train2017/{k:012d}.jpg", b"x")
    command = [sys.executable, "-m", "benchmarks.shards", "", "", "--plan-only", str(path)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    lines = [f"planning {images:,} images ({path.stat().st_size / 1e6:,.0f} MB of JSON) as {found['shards']} shards"]
    lines += [f"  {name:24} {seconds:8.2f} s CPU" for name, seconds in found["spent"].items()]
    return [*lines, f"  {'peak memory':24} {found['peak'] / 1024:8.0f} MiB"]


def measure_steps(annotations: Path, images: str) -> list[str]:
    """CPU time per image of everything that is done to one, on images that are in the page cache."""
    from webdataset import TarWriter  # here, because its torch would count in the memory of planning

    samples = examine(annotations, images, limit=256).samples
    data = [read_image_file(file) for _, file in samples]
    sizes = [(image.height, image.width) for image, _ in samples]
    keys = [{"__key__": f"{image.id:012d}", "jpg": bytes_} for (image, _), bytes_ in zip(samples, data, strict=True)]
    summary, tar = Summary(), TarWriter(io.BytesIO(), encoder=False, mtime=0)
    steps: dict[str, Callable[[int], object]] = {
        "header check": lambda i: check_headers([(samples[i][0].file_name, sizes[i], samples[i][1])]),
        "read": lambda i: read_image_file(samples[i][1]),
        "decode check": lambda i: check_decodes(data[i], sizes[i]),
        "count boxes": lambda i: summary.add(samples[i][0].annotations, sizes[i]),
        "write to tar": lambda i: tar.write(keys[i]),
        "sha256": lambda i: hashlib.sha256(data[i]).digest(),
    }
    spent = {}
    for name, step in steps.items():
        clock = time.process_time()
        for i in range(len(samples)):
            step(i)
        spent[name] = 1000 * (time.process_time() - clock) / len(samples)
    total = sum(spent.values())
    lines = [f"steps of one image, over {len(samples)} of {sum(map(len, data)) / len(data) / 1000:.0f} kB on average"]
    lines += [f"  {name:24} {ms:8.2f} ms CPU {ms / total:6.0%}" for name, ms in spent.items()]
    return [*lines, f"  {'all':24} {total:8.2f} ms CPU"]


def repeat(annotations: Path, images: int, out: Path) -> None:
    """An annotation file of `images` images: those given, again and again under new ids."""
    tree = json.loads(annotations.read_bytes())
    by_image: dict[int, list[Any]] = {}
    for annotation in tree["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    entries: list[Any] = []
    boxes: list[Any] = []
    for k in range(images):
        image = tree["images"][k % len(tree["images"])]
        entries.append(image | {"id": k + 1})
        for annotation in by_image.get(image["id"], []):
            boxes.append(annotation | {"id": len(boxes) + 1, "image_id": k + 1})
    out.write_text(
        json.dumps({"images": entries, "annotations": boxes, "categories": tree["categories"]}), encoding="utf-8"
    )


def measure_builds(work: Path, annotations: Path, source: str, images: int, rounds: int) -> list[str]:
    """Lines about whole builds, and the proof of the last one."""
    repeated = work / "repeated.json"
    repeat(annotations, images, repeated)
    best = dict.fromkeys((1, 2), float("inf"))
    digests = set()
    for number in range(rounds):
        for workers in best:
            out = work / f"out{number}-{workers}"
            clock = time.monotonic()
            digests.add(build_shards(repeated, source, out, workers=workers, samples_per_shard=128).digest)
            best[workers] = min(best[workers], time.monotonic() - clock)
    clock = time.monotonic()
    faults = verify_shards(str(out))
    proof = time.monotonic() - clock
    lines = [f"builds of {images:,} images, best of {rounds}, by the clock; all the same bytes: {len(digests) == 1}"]
    for workers, seconds in best.items():
        note = ", with the start of Ray" if workers > 1 else ""
        lines.append(
            f"  {workers} worker{'s' * (workers > 1):22} {seconds:8.1f} s {images / seconds:8.0f} images/s{note}"
        )
    return [*lines, f"  {'verify, 1 worker':24} {proof:8.1f} s {images / proof:8.0f} images/s, {len(faults)} faults"]


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    if args.plan_only:
        return plan_only(Path(args.plan_only))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for line in measure_planning(work, args.planned):
            print(line)
        for line in measure_steps(Path(args.annotations), args.source):
            print(line)
        for line in measure_builds(work, Path(args.annotations), args.source, args.images, args.rounds):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))

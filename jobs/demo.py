"""The whole pipeline on synthetic shapes in one command: `python -m jobs.demo`, or `make demo`.

It draws a data set, shards it, trains with two Ray Train workers under DeepSpeed, evaluates COCO AP, tracks and
registers in MLflow, and draws detections. A second call continues the run; delete `runs/demo` to start again. With
`--data` it ends after the shards, which the spaces of `tune/spaces/*demo.yaml` use.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from jobs.cli import CommandParser, main
from pipeline.config import Config, load_config


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser("jobs.demo", __doc__.splitlines()[0], "python -m jobs.demo train.epochs=2")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of jobs/configs/demo.yaml")
    parser.add_argument("--data", action="store_true", help="only draw the data set and write its shards")
    return parser


def run(args: argparse.Namespace) -> int:
    """Data, training, registry, drawings, table."""
    start, config = time.monotonic(), load_config(Path(__file__).parent / "configs" / "demo.yaml", args.overrides)
    from pipeline.data.sharding.demo_data import make_demo_data  # not at the top: these imports take seconds

    make_demo_data(config.data.train, config.data.val)
    if args.data:
        print(f"drawn: {config.data.train}, {config.data.val}")
        return 0
    from pipeline.launch.driver import train
    from pipeline.launch.run_report import report_run
    from pipeline.registry.register import register
    from pipeline.tracking.store import pages

    record = train(config, resume="auto")
    name = config.tracking.register_as or config.name
    version = register(record, name, config.tracking.alias)
    draw_examples(config, record.checkpoint, Path(record.folder))
    rows = {
        **{name: f"{record.metrics[f'val/{name}']:.3f}" for name in ("AP", "AP50", "AP_small")},
        "images/s": f"{record.metrics.get('perf/images_per_s', math.nan):.1f}",  # of this start, if it trained
        "time": f"{(time.monotonic() - start) / 60:.1f} min",
        "model": f"models:/{name}@{config.tracking.alias} (version {version})",
        "drawings": f"{record.folder}/detections_*.png",
        "MLflow": pages(record.config["tracking"]["uri"]),
    }
    print(report_run(record), *(f"{name:9} {value}" for name, value in rows.items()), sep="\n")
    return 0


def draw_examples(config: Config, checkpoint_folder: str, out: Path, count: int = 3) -> None:
    """Draw the trained model's detections on the first validation images that have objects, as PNG files."""
    from pipeline.checkpoint import load_inference
    from pipeline.data.index import load_index
    from pipeline.evaluation.drawing import draw_detections, drawing_paths, save_drawing
    from pipeline.files.storage import local_copy
    from pipeline.inference.predictor import Predictor, read_image

    with local_copy(checkpoint_folder) as folder:
        predictor = Predictor(load_inference(folder))
    samples, images = load_index(config.data.val).samples, Path(config.data.val).parent / "raw/val/images"
    paths = [images / f"{image:012d}.jpg" for image in samples.image_id[samples.boxes > 2][:count].tolist()]
    for path, target in zip(paths, drawing_paths(out, paths, "detections_"), strict=True):
        save_drawing(draw_detections(read_image(path), predictor.predict([path])[0]), target)


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))

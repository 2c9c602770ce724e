"""A prediction over many images as a whole: find the model, predict here or on a cluster, write the results.

What is done is kept in parts beside the output, where the same request continues. Raises RunError and TrackingError for
the model, ResourceError for the cluster, StorageError for the output. Ctrl-C leaves the parts and says so.
"""

import hashlib
import json
import os
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pipeline.checkpoint import STATE, Inference, load_inference
from pipeline.config import Config
from pipeline.engine.cpu_tuning import process_environment
from pipeline.errors import after_start
from pipeline.evaluation.drawing import drawing_paths
from pipeline.files.atomic import remove_unfinished
from pipeline.files.outputs import check_output
from pipeline.inference.image_sources import ImageSource, number_images
from pipeline.inference.predict_images import BuildPrediction, ImageWork, PredictionOptions
from pipeline.inference.prediction_output import images_file, write_results
from pipeline.inference.prediction_parts import PartFolder, Row
from pipeline.launch.model_evaluation import choose_device
from pipeline.launch.prediction_request import Outputs, Pool
from pipeline.logs import get_logger
from pipeline.model.weights.files import file_digest
from pipeline.progress import Progress
from pipeline.registry.locate import checkpoint_folder

VERSION = 1  # of what the parts hold
log = get_logger("prediction")


@dataclass(frozen=True)
class PredictionSummary:
    """What came out."""

    outputs: Outputs
    images: int
    detections: int
    unreadable: tuple[tuple[str, str], ...]  # name and reason

    def __str__(self) -> str:
        """What was written."""
        paths = " and ".join(str(path) for path in (self.outputs.results, self.outputs.drawings) if path)
        return f"{paths}: {self.detections} detections in {self.images - len(self.unreadable)} images"

    @property
    def faults(self) -> str:
        """Lines with the images that could not be read and their reasons; empty if there are none."""
        head = f"{len(self.unreadable)} of {self.images} images could not be read:\n"
        return head * bool(self.unreadable) + "".join(f"  {name}: {reason}\n" for name, reason in self.unreadable)


@dataclass(frozen=True)
class _Prediction:
    """A request with its model and the resources that it gets."""

    inference: Inference  # with the scaling of this prediction in its config
    images: Sequence[ImageSource]
    options: PredictionOptions
    outputs: Outputs
    pool: Pool

    @cached_property
    def drawings(self) -> Sequence[Path | None]:
        """Where the drawing of each image goes; never a file that is read."""
        if self.outputs.drawings is None:
            return [None] * len(self.images)
        folders = [Path(image.file.path).parent if image.file else Path() for image in self.images]
        named = [
            folder / (Path(image.name).name or "image") for folder, image in zip(folders, self.images, strict=True)
        ]
        return drawing_paths(self.outputs.drawings, named, suffix=self.outputs.suffix)

    def digest(self, model: str) -> str:
        """sha256 of everything that rows and drawings depend on; the number of workers does not count."""
        scaling, drawings = self.pool.scaling, self.outputs.drawings
        folder = "" if drawings is None else os.path.abspath(drawings)
        settings = [VERSION, model, self.options.limits, self.options.exif, folder, self.outputs.suffix]
        settings += [scaling.use_gpu, scaling.cpus_per_worker]
        digest = hashlib.sha256(json.dumps(settings).encode())
        for image in self.images:
            digest.update(f"{image!r}\n".encode())
        return digest.hexdigest()

    def predict(self, parts: PartFolder) -> None:
        """Predict on the images that have no row."""
        missing, total = parts.missing(), len(self.images)
        if len(missing) < total:
            log.info("%d of %d images were done before", total - len(missing), total)
        if not missing:
            return
        build = BuildPrediction.of(
            self.inference, tuple(ImageWork(self.images[k], self.drawings[k]) for k in missing), self.options
        )
        start, bar = time.monotonic(), Progress(len(missing), "prediction", "image", rate=True)
        with bar, closing(_run(build, len(missing), self.inference.config, self.pool)) as results:
            for item, row in results:
                parts.add(missing[item], row)
                bar.advance()
        seconds = time.monotonic() - start
        workers = f"{self.pool.scaling.num_workers} workers" if self.pool.on_actors else "one process"
        speed = len(missing) / seconds
        log.info("%d images on %s in %.1f s, %.3g images/s", len(missing), workers, seconds, speed)

    def write(self, parts: PartFolder) -> PredictionSummary:
        """Write the results file, and remove what killed processes have left."""
        names = [image.name for image in self.images]
        written = [path for path in self.drawings if path is not None]
        if self.outputs.results is not None:
            numbers = number_images(self.images)
            write_results(self.outputs.results, parts.rows(), names, numbers, self.inference.categories)
            written += [self.outputs.results, images_file(self.outputs.results)]
        remove_unfinished(written)
        unreadable, detections = [], 0
        for number, row in parts.rows():
            detections += len(row.get("scores", ()))
            if "fault" in row:
                unreadable.append((names[number], row["fault"]))
        return PredictionSummary(self.outputs, len(names), detections, tuple(unreadable))


def predict_images(
    model: str,
    images: Sequence[ImageSource],
    options: PredictionOptions,
    outputs: Outputs,
    pool: Pool,
    tracking_uri: str | None = None,
) -> PredictionSummary:
    """Predict on images, and write what was asked for.

    Args:
        model: as `registry.locate.checkpoint_folder` takes it.
        images: from `list_images`, at least one.
        options: what is kept of each image.
        outputs: what is written.
        pool: where it runs.
        tracking_uri: the MLflow store of a registered version.

    Raises:
        InputError: wrong input; nothing was started.
        PipelineError: the prediction failed.
        KeyboardInterrupt: with a text that says how to continue.
    """
    with checkpoint_folder(model, tracking_uri) as folder:
        if outputs.results is not None:
            check_output(outputs.results, [folder])
        digest = file_digest(folder / STATE)
        inference = load_inference(folder)
    if pool.on_actors:
        from pipeline.launch.cluster import check_resources, resolve_gpu, start_ray  # Ray takes seconds

        start_ray()
        scaling = resolve_gpu(pool.scaling)
        check_resources(scaling)
    else:
        config = inference.config.model_copy(update={"scaling": pool.scaling})
        scaling = pool.scaling.model_copy(update={"use_gpu": choose_device(config) == "cuda"})
    inference = replace(inference, config=inference.config.model_copy(update={"scaling": scaling}))
    prediction = _Prediction(inference, images, options, outputs, replace(pool, scaling=scaling))
    with PartFolder(outputs.parts, prediction.digest(digest), len(images)) as parts, after_start():
        try:
            prediction.predict(parts)
            summary = prediction.write(parts)
        except KeyboardInterrupt:
            kept = f"{len(images) - len(parts.missing())} of {len(images)} images"
            raise KeyboardInterrupt(f"{kept} are kept in {outputs.parts}; the same command continues") from None
        parts.remove()
        return summary


def _run(build: BuildPrediction, items: int, config: Config, pool: Pool) -> Generator[tuple[int, Row], None, None]:
    """Each item with its row, in this process or on actors."""
    if not pool.on_actors:
        yield from enumerate(build()(range(items)))
        return
    from pipeline.inference.pool import run_on_actors  # Ray takes seconds
    from pipeline.launch.worker_output import filter_output

    environment = process_environment(config.train, pool.scaling.use_gpu is True)
    with filter_output():
        yield from run_on_actors(build, items, pool.scaling, environment)

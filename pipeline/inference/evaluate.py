"""COCO AP of a loaded checkpoint, in this process or on the actors of a pool: the same detections, bit for bit.

The groups of images are those of a single process, and every group is computed as it would be there. So neither the
number of workers nor the death of one changes a result. What changes its last bits on a CPU is the number of threads of
a process, by which torch chooses kernels. Raises DetectionError, ShardError, and the errors of the pool.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Inference, restore_weights
from pipeline.config import Config, ScalingConfig, dump, from_dict
from pipeline.engine.cpu_tuning import process_environment, tune_model
from pipeline.errors import ConfigError, ShardError
from pipeline.evaluation.detections import Detections, concatenate
from pipeline.evaluation.evaluator import Evaluator, Result, build_evaluator, evaluation_mode
from pipeline.model import Detector, build_model
from pipeline.progress import Progress
from pipeline.runtime import make_deterministic, single

GroupResult = tuple[list[int], Detections]  # image ids of a group, and their detections


def set_threads(scaling: ScalingConfig) -> None:
    """Let this process compute with the threads of a worker that has no GPU."""
    torch.set_num_threads(max(1, int(scaling.cpus_per_worker)))


def open_evaluator(config: Config, inference: Inference, device: str) -> Evaluator:
    """An evaluator over `data.val` of `config`, for one process.

    Args:
        config: the checkpoint's, with the settings of this evaluation.
        inference: the checkpoint; its categories must be those of the data.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError, ShardError: the data cannot be read, or have other categories.
    """
    evaluator = build_evaluator(config.data, config.evaluation, single(device))
    if evaluator.loader.index.categories != inference.categories:
        raise ConfigError(f"{config.data.val} has other categories than the model was trained on; set data.val")
    return evaluator


def evaluate_here(
    evaluator: Evaluator, inference: Inference, config: Config, wrap: Callable[[nn.Module], nn.Module] | None = None
) -> Result:
    """Evaluate in this process, on the evaluator's device.

    Args:
        evaluator: from `open_evaluator`.
        inference: the checkpoint.
        config: the checkpoint's, with the settings of this evaluation.
        wrap: gives the module that runs instead of the model itself.
    """
    model = _ready(inference.model, config, evaluator.runtime.device)
    result = evaluator.run(wrap(model) if wrap else model)
    assert result is not None, "a single process is rank 0"
    return result


def evaluate_on_actors(evaluator: Evaluator, inference: Inference, config: Config, scaling: ScalingConfig) -> Result:
    """Evaluate on actors that each hold the model; Ray must have been started.

    Args:
        evaluator: of this process, which scores; its device is not used.
        inference: the checkpoint.
        config: the checkpoint's, with the settings of this evaluation; all nodes must see its paths.
        scaling: the pool, with `use_gpu` resolved.

    Raises:
        ShardError: a node has other data under the same path.
        PipelineError: see `pool.run_on_actors`.
    """
    from pipeline.inference.pool import run_on_actors  # not at the top: Ray takes seconds, and one process needs none

    config = config.model_copy(update={"scaling": scaling})
    loader = evaluator.loader
    build = BuildDetection(dump(config), inference.model.state_dict(), loader.index.digest)
    environment = process_environment(config.train, scaling.use_gpu is True)
    groups: dict[int, GroupResult] = {}
    with Progress(loader.images, "evaluation", "image", rate=True) as bar:
        for number, group in run_on_actors(build, len(loader.groups), scaling, environment):
            groups[number] = group
            bar.advance(len(group[0]))
    ordered = [groups[number] for number in sorted(groups)]
    images = [image for ids, _ in ordered for image in ids]
    return evaluator.score(images, concatenate(found for _, found in ordered))


@dataclass(frozen=True)
class BuildDetection:
    """Makes the work of an actor: the detections of groups of `data.val`, by their numbers."""

    config: dict[str, Any]  # as `dump` gives it
    weights: dict[str, Tensor]
    digest: str  # of the shards' index

    def __call__(self) -> "DetectGroups":
        """Build the model and open the data. Raises ShardError if these are other data than the driver's."""
        config = from_dict(self.config, "payload")
        device = "cuda" if config.scaling.use_gpu is True else "cpu"
        if device == "cpu":
            set_threads(config.scaling)
        evaluator = build_evaluator(config.data, config.evaluation, single(device))
        if evaluator.loader.index.digest != self.digest:
            raise ShardError(f"{config.data.val} holds other data on one of the nodes; share one folder, or use a URL")
        model = build_model(config.model, load_backbone=False)
        restore_weights(model, self.weights)
        return DetectGroups(evaluator, _ready(model, config, evaluator.runtime.device))


@dataclass(frozen=True)
class DetectGroups:
    """The work of an actor; see `pool.Work`."""

    evaluator: Evaluator
    model: Detector

    def __call__(self, items: range) -> Iterator[GroupResult]:
        """The detections of these groups."""
        with evaluation_mode(self.model):
            yield from self.evaluator.detect(self.model, self.evaluator.loader.batches(items))


def _ready(model: Detector, config: Config, device: torch.device) -> Detector:
    """The model as every process of an evaluation runs it."""
    if config.train.deterministic:
        make_deterministic()
    model = model.to(device)
    tune_model(model, config.train, device)
    return model

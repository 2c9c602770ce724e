"""One global batch of five pad groups, which no world size but 1 and 5 divides, and its training in one process."""

from dataclasses import dataclass

import torch

from pipeline.config import LossConfig, OptimConfig, Precision
from pipeline.data.batch import Batch
from pipeline.data.plan import assign_groups
from pipeline.engine.backend import Backend, PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.model import build_criterion, build_model
from pipeline.runtime import Runtime, single
from support.model import padded_images, random_targets, small_config, small_detr

BOXES = ((7, 1), (0, 0), (3, 0), (0, 0), (0, 12))  # of the images of each group; of two ranks, the second has none
SIZES = ((64, 96), (96, 80), (80, 64), (64, 64), (72, 96))
STEPS = 3
MODELS = {
    "deformable_detr": (small_config(dropout=0.1, refine=True, two_stage=True), LossConfig()),
    "detr": (small_detr(dropout=0.1), LossConfig(classification="softmax", class_weight=1, class_cost=1)),
}
OPTIM = OptimConfig()


@dataclass
class Trace:
    losses: list[dict[str, float]]
    norms: list[float]
    applied: list[bool]
    weights: dict[str, torch.Tensor]  # after STEPS steps


def batches(rank: int, world: int, step: int) -> list[Batch]:
    """This rank's share of the step's five groups, as the loader hands it out."""
    return [batch(turn.group, turn.weight, step) for turn in assign_groups(len(BOXES), rank, world)]


def batch(group: int, weight: float, step: int) -> Batch:
    seed = 100 * step + group
    images, mask = padded_images(SIZES[group], SIZES[(group + step) % len(SIZES)], seed=seed)
    targets = random_targets(*BOXES[group], seed=seed)
    return Batch(
        images=images,
        mask=mask,
        boxes_cxcywh=torch.cat([target["boxes"] for target in targets]),
        labels=torch.cat([target["labels"] for target in targets]),
        target_offsets=torch.tensor([0, BOXES[group][0], sum(BOXES[group])]),
        image_ids=torch.tensor([2 * group, 2 * group + 1]),
        sizes=torch.tensor([SIZES[group]] * 2),
        group=group,
        weight=weight,
    )


def build(name: str, precision: Precision) -> LossModule:
    torch.manual_seed(0)
    model, loss = MODELS[name]
    return LossModule(build_model(model), build_criterion(loss), precision)


def run(module: LossModule, backend: Backend, runtime: Runtime, steps: int = STEPS) -> Trace:
    torch.set_num_threads(1)
    engine = Engine(module, backend, runtime, seed=0)
    results = [engine.train_step(batches(runtime.rank, runtime.world, step), step) for step in range(steps)]
    whole = backend.whole_model() if isinstance(backend, DeepSpeedBackend) else module.model
    return Trace(
        [result.losses for result in results],
        [result.grad_norm for result in results],
        [result.applied for result in results],
        {name: p.detach().clone() for name, p in whole.named_parameters()},
    )


def run_plain(name: str, precision: Precision) -> Trace:
    module = build(name, precision)
    return run(module, PlainBackend(module, OPTIM, torch.device("cpu"), precision), single())

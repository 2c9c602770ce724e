"""The losses of five optimizer steps, recorded: they move only when the arithmetic of model, loss or optimizer does.

Weights, images and boxes come from NumPy's PCG64 and nothing drops out, so that only rounding differs between machines:
neither a JPEG encoder nor torch's generators have a part in it. If the curve moves on purpose, say so in the CHANGELOG
and record it again: `python tests/engine/test_golden_curve.py` prints it.
"""

import json
import zlib

import numpy as np
import pytest
import torch
from support.model import small_config
from support.paths import ASSETS

from pipeline.config import LossConfig, OptimConfig
from pipeline.data.batch import Batch
from pipeline.engine.backend import PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single

GOLDEN = ASSETS / "golden_losses.json"
STEPS, GROUPS = 5, 2
SIZE = (96, 128)
BOXES = (3, 0, 1, 5)  # of the images of one step


def noise(name: str, *shape: int) -> torch.Tensor:
    """Gaussian numbers that are a function of the name."""
    draw = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(draw.standard_normal(shape)).float()


def group(step: int, index: int) -> Batch:
    """A pad group of two images; the second is padded."""
    draw = np.random.Generator(np.random.PCG64([step, index]))
    counts = BOXES[2 * index : 2 * index + 2]
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[1, :, 100:] = True
    return Batch(
        images=torch.from_numpy(draw.integers(0, 256, (2, 3, *SIZE), np.uint8)),
        mask=mask,
        boxes_cxcywh=torch.from_numpy(0.2 + 0.4 * draw.random((sum(counts), 4))).float(),
        labels=torch.from_numpy(draw.integers(0, 5, sum(counts))),
        target_offsets=torch.tensor(np.cumsum([0, *counts])),
        image_ids=torch.arange(2),
        sizes=torch.tensor([SIZE, (96, 100)]),
        group=index,
        weight=1.0,
    )


def losses() -> list[dict[str, float]]:
    """Of each step."""
    torch.set_num_threads(1)
    model = build_model(small_config(refine=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(noise(name, *parameter.shape) / parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):  # the weights of norms are ones
                parameter.copy_(0.1 * noise(name, *parameter.shape))
    module = LossModule(model, build_criterion(LossConfig()))
    engine = Engine(module, PlainBackend(module, OptimConfig(lr=1e-3), torch.device("cpu")), single(), seed=0)
    results = [engine.train_step([group(step, index) for index in range(GROUPS)], step) for step in range(STEPS)]
    return [{name: round(value, 5) for name, value in result.losses.items()} for result in results]


def test_training_losses_follow_the_golden_curve() -> None:
    for step, (actual, golden) in enumerate(zip(losses(), json.loads(GOLDEN.read_text()), strict=True)):
        assert actual == pytest.approx(golden, rel=1e-3), step


if __name__ == "__main__":
    print(json.dumps(losses(), indent=1))

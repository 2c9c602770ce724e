"""The presets as rows of a table: published figures of each, and parameters, GFLOPs, speed and AP measured here.

A preset is a YAML file with a `name`; files that only serve as a base have none. A folder without presets, or a name
that no preset has, is a ConfigError.
"""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from pipeline.config import AugmentConfig, Config, ModelConfig, load_config, read_yaml
from pipeline.config.suggest import nearest
from pipeline.data.index import load_index
from pipeline.data.transforms import evaluation_view
from pipeline.engine.cpu_tuning import tune_model
from pipeline.errors import ConfigError
from pipeline.model import build_model
from pipeline.model.flops import Size, multiply_adds
from pipeline.model.postprocess import postprocess
from pipeline.presets.published import Published, find_published
from pipeline.presets.trained import TrainedRun

# Sizes (height, width) of 80 images of val2017 drawn at random; a size and its transpose cost the same.
VAL_SIZES: Mapping[Size, int] = {
    (480, 640): 26, (427, 640): 11, (426, 640): 9, (428, 640): 6, (375, 500): 4, (425, 640): 3, (333, 500): 2,
    (240, 320): 1, (320, 640): 1, (332, 500): 1, (334, 500): 1, (357, 500): 1, (358, 640): 1, (368, 640): 1,
    (370, 500): 1, (374, 500): 1, (424, 640): 1, (429, 640): 1, (444, 640): 1, (449, 640): 1, (460, 640): 1,
    (461, 614): 1, (464, 640): 1, (478, 640): 1, (479, 640): 1, (486, 500): 1,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One preset. Parameters count everything that is learned somewhere; AP is in percent."""

    preset: str
    published: Published
    trainable: int
    parameters: int  # with the frozen ones
    gflops: float  # thousand millions of multiply-adds per image, as evaluated (one view)
    fps: float | None = None  # images per second, one at a time
    trained: TrainedRun | None = None


def find_presets(folder: Path) -> dict[str, Config]:
    """Every preset of a folder by its file's name, roughly in the order of the paper's tables; others last."""
    paths = [path for path in sorted(folder.glob("*.yaml")) if "name" in read_yaml(path)]
    if not paths:
        raise ConfigError(f"there are no presets in {folder}: no *.yaml has a `name`")
    configs = {path.stem: _with_numbers(load_config(path)) for path in paths}
    return dict(sorted(configs.items(), key=lambda item: _place(find_published(item[0]))))


def _with_numbers(config: Config) -> Config:
    """The config with the default number of classes, COCO's, where a run would count those of its data."""
    if config.model.num_classes != "auto":
        return config
    classes = type(config.model)().classes
    return config.model_copy(update={"model": config.model.model_copy(update={"num_classes": classes})})


def _place(row: Published) -> tuple[int, int, float]:
    """Sort key: within a table long trainings come first, as in Table 1, then by rising AP."""
    ap = row.ap or row.ap_test_dev or row.ap_code or 0
    return ("1", "2", "3", "code", "").index(row.table), -(row.epochs or 0), ap


def select(presets: Mapping[str, Config], names: Sequence[str]) -> dict[str, Config]:
    """The presets with these names, or all of them if `names` is empty."""
    for name in names:
        if name not in presets:
            raise ConfigError(f"there is no preset {name}; did you mean {nearest(name, presets)}?")
    return {name: config for name, config in presets.items() if name in names or not names}


def sizes_of(shards: str) -> dict[Size, int]:
    """Number of images of a shard folder by (height, width). Raises ShardError."""
    return Counter((int(height), int(width)) for height, width in load_index(shards).sizes())


def describe(name: str, config: Config, sizes: Mapping[Size, int] = VAL_SIZES) -> Row:
    """A preset's row without measured speed and trained AP; `sizes` are those of the original images."""
    with torch.device("meta"):
        parameters = list(build_model(config.model, load_backbone=False).parameters())
    seen = evaluation_sizes(sizes, config.data.augment)
    return Row(
        name,
        find_published(name),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters),
        _multiply_adds(config.model, tuple(sorted(seen.items()))) / 1e9,
    )


def evaluation_sizes(sizes: Mapping[Size, int], augment: AugmentConfig) -> dict[Size, int]:
    """Sizes after evaluation's resizing, the shorter side first, with their counts."""
    seen: Counter[Size] = Counter()
    for size, number in sizes.items():
        height, width = sorted(evaluation_view(size, augment).out_size)
        seen[height, width] += number
    return seen


@lru_cache  # presets that differ only in training have the same model
def _multiply_adds(model: ModelConfig, sizes: tuple[tuple[Size, int], ...]) -> float:
    return multiply_adds(model, dict(sizes))


@torch.no_grad()
def images_per_second(config: Config, images: int, device: torch.device) -> float:
    """Speed of the forward pass and the selection of boxes, one image at a time, median of `images` after a first one.

    Weights and images are random, at the commonest evaluation size; a detector with NMS may be faster once trained.
    """
    torch.manual_seed(0)
    model = build_model(config.model, load_backbone=False).eval().to(device)
    tune_model(model, config.train, device)
    seen = evaluation_sizes(VAL_SIZES, config.data.augment)
    height, width = max(seen, key=lambda size: seen[size])
    mask, size = torch.zeros(1, height, width, dtype=torch.bool, device=device), torch.tensor([[height, width]])
    seconds = []
    for _ in range(images + 1):
        image = torch.randn(1, 3, height, width, device=device)
        start = time.perf_counter()
        postprocess(model(image, mask), size)[0]["scores"].cpu()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[1:])

"""The `data` section: where the shards are, augmentation, loaders."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pipeline.config.base import Count, Location, Section, Share, Side


def _check_order(pair: tuple[int, int]) -> tuple[int, int]:
    if pair[0] > pair[1]:
        raise ValueError("is reversed; give [smallest, largest]")
    return pair


class AugmentConfig(Section):
    """Training augmentation (reference recipe: Deformable DETR, COCO) and the evaluation size. Sizes in pixels."""

    flip: Share = 0.5
    """Probability that a training image is mirrored left to right.
    Set 0 where left and right differ in meaning, as in text."""

    scales: Annotated[tuple[Side, ...], Field(min_length=1)] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shortest sides in pixels that training images are resized to; one is drawn for each.
    Smaller ones save time and memory and cost AP of small objects."""

    max_size: Side = 1333
    """Longest side in pixels after any resize to `data.augment.scales` or `data.augment.eval_size`."""

    crop: Share = 0.5
    """Probability that a training image is resized, cropped and resized again, instead of resized once."""

    crop_scales: Annotated[tuple[Side, ...], Field(min_length=1)] = (400, 500, 600)
    """Shortest sides in pixels before a crop; one is drawn for each cropped image."""

    crop_range: Annotated[tuple[Side, Side], AfterValidator(_check_order)] = (384, 600)
    """Smallest and largest side of a crop in pixels."""

    resample: Literal["reference", "fused"] = "reference"
    """How training images are resized: `reference` as published, `fused` with one resample, about twice as fast.
    Use `fused` where training waits for data."""

    eval_size: Side = 800
    """Shortest side in pixels that images are resized to in evaluation and prediction."""


class DataConfig(Section):
    """Where the shards are and how samples become batches."""

    train: Location = ""
    """Shards to train on: the folder or fsspec URL that `jobs.shard build` wrote."""

    val: Location = ""
    """Shards to evaluate on: the folder or fsspec URL that `jobs.shard build` wrote."""

    labels: Literal["contiguous", "raw"] = "contiguous"
    """How category ids become labels: `contiguous` counts them from 0, `raw` takes the id itself.
    `raw` with `model.num_classes: 91` is the layout of published COCO weights."""

    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Processes per worker that read and decode images, for training and evaluation together.
    0 decodes in the training process. Raise it where training waits for data and CPUs are idle."""

    mix_shards: Count = 16
    """Shards whose samples are shuffled together, and from which an epoch reads at a time.
    More mix better; fewer need less cache."""

    window: Count = 256
    """Samples among which similar sizes are grouped, so that less is padded.
    From 8 x `train.global_batch` on, 256 for the recipe's 32, the workers of a step have equal work.
    Larger windows make the images of a step more alike."""

    pad_multiple: int = Field(1, ge=1, le=1024)
    """Training images are padded to sides that are multiples of this, in pixels; 1 pads no more than a group needs.
    64 gives a GPU about a hundred sizes instead of thousands, for 6 % more pixels. Evaluation does not read it."""

    tail: Literal["drop", "wrap"] = "drop"
    """What becomes of an epoch's last incomplete step: `drop` leaves it out, `wrap` fills it with samples from
    the epoch's start. Use `wrap` with very few images."""

    cache_dir: Location = ""
    """Folder in which each node keeps remote shards; it holds nothing else.
    Empty takes a folder of this user in the temporary folder."""

    cache_gib: float = Field(32, ge=0, le=1e6)
    """Largest size of `data.cache_dir` in GiB. 0 turns the cache off: remote samples are read one by one."""

    augment: AugmentConfig = AugmentConfig()

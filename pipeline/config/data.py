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

    flip: Share = 0.5  # probability of a horizontal flip
    # Shortest side, one is drawn.
    scales: Annotated[tuple[Side, ...], Field(min_length=1)] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    max_size: Side = 1333  # longest side after any resize to `scales` or `eval_size`
    crop: Share = 0.5  # probability of branch B: resize, crop, resize
    crop_scales: Annotated[tuple[Side, ...], Field(min_length=1)] = (400, 500, 600)  # shortest side before the crop
    crop_range: Annotated[tuple[Side, Side], AfterValidator(_check_order)] = (
        384,
        600,
    )  # smallest and largest crop side
    resample: Literal["reference", "fused"] = "reference"  # fused: one resample per training image, about twice as fast
    eval_size: Side = 800  # shortest side in evaluation


class DataConfig(Section):
    """Where the shards are and how samples become batches."""

    train: Location = ""  # shard folder or fsspec URL written by `jobs.shard build`
    val: Location = ""
    labels: Literal["contiguous", "raw"] = "contiguous"  # raw = published 91-logit layout: label is the category id
    workers: Annotated[int, Field(ge=0, le=1024)] = 2  # loader processes per rank, for training and evaluation together
    mix_shards: Count = 16  # shards whose samples are shuffled together: what is read from at a time
    # Samples among which similar sizes are grouped. The ranks of a step have equal work from 8 x train.global_batch on,
    # which is what this is for the recipe's 32; larger ones make the images of a step more alike.
    window: Count = 256
    tail: Literal["drop", "wrap"] = "drop"  # what becomes of an epoch's last incomplete step
    cache_dir: Location = (
        ""  # where each node keeps remote shards; empty: a folder of this user in the temporary folder
    )
    cache_gib: float = Field(32, ge=0, le=1e6)  # its limit in GiB; 0 = no cache, remote samples are read one by one
    augment: AugmentConfig = AugmentConfig()

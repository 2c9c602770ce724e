"""The `data` section: where the shards are, augmentation, loaders."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Section


class AugmentConfig(Section):
    """Training augmentation (reference recipe: Deformable DETR, COCO) and the evaluation size. Sizes in pixels."""

    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip
    scales: tuple[int, ...] = (
        480,
        512,
        544,
        576,
        608,
        640,
        672,
        704,
        736,
        768,
        800,
    )  # shortest side, one is drawn
    max_size: int = Field(1333, ge=1)  # longest side after any resize to `scales` or `eval_size`
    crop: float = Field(0.5, ge=0, le=1)  # probability of branch B: resize, crop, resize
    crop_scales: tuple[int, ...] = (400, 500, 600)  # shortest side before the crop
    crop_range: tuple[int, int] = (384, 600)  # smallest and largest crop side
    resample: Literal["reference", "fused"] = "reference"  # fused: one resample per training image, about twice as fast
    eval_size: int = Field(800, ge=1)  # shortest side in evaluation


class DataConfig(Section):
    """Where the shards are and how samples become batches."""

    train: str = ""  # shard folder or fsspec URL written by `jobs.shard build`
    val: str = ""
    labels: Literal["contiguous", "raw"] = "contiguous"  # raw = published 91-logit layout: label is the category id
    workers: int = Field(2, ge=0)  # loader processes per rank, for training and evaluation together
    mix_shards: int = Field(16, ge=1)  # shards whose samples are shuffled together: what is read from at a time
    # Samples among which similar sizes are grouped. The ranks of a step have equal work from 8 x train.global_batch on,
    # which is what this is for the recipe's 32; larger ones make the images of a step more alike.
    window: int = Field(256, ge=1)
    tail: Literal["drop", "wrap"] = "drop"  # what becomes of an epoch's last incomplete step
    cache_dir: str = ""  # where each node keeps remote shards; empty: a folder of this user in the temporary folder
    cache_gib: float = Field(32, ge=0)  # its limit in GiB; 0 = no cache, remote samples are read one by one
    augment: AugmentConfig = AugmentConfig()

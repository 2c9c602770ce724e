"""The `data` section: where the shards are, augmentation, loaders."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.augment import AugmentConfig
from pipeline.config.base import Count, Location, Section, Share


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

    balance: Share = 0.0
    """Classes that fewer than this share of the training images contain are seen more often: an image is repeated
    sqrt(balance / share of its rarest class) times in an epoch, on average, each time with other augmentation.
    0 turns it off; 0.001 is LVIS's value (Gupta et al., 2019), 0.1 to 0.3 suits a few classes."""

    cache_dir: Location = ""
    """Folder in which each node keeps remote shards; it holds nothing else.
    Empty takes a folder of this user in the temporary folder."""

    cache_gib: float = Field(32, ge=0, le=1e6)
    """Largest size of `data.cache_dir` in GiB. 0 turns the cache off: remote samples are read one by one."""

    augment: AugmentConfig = AugmentConfig()

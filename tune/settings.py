"""The section `search` of a space file, and the values of one of its settings. Independent of Ray.

A wrong section is a pydantic ValidationError, which `tune.load` turns into one ConfigError with all faults.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Section
from pipeline.config.base import LARGEST, Count

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
KINDS = ("choice", "grid", "uniform", "loguniform", "randint")
# The old setting `search.method`, and what it stands for.
METHODS = {"asha": ("random", "asha"), "random": ("random", "none"), "grid": ("grid", "none")}


class Domain(Section):
    """The values of one setting: exactly one of the kinds."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these, chosen for each sample."""

    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of these, for every sample."""

    uniform: tuple[float, float] | None = None
    """Lowest and highest."""

    loguniform: tuple[float, float] | None = None
    """Lowest and highest, uniform in the logarithm."""

    randint: tuple[Int64, Int64] | None = None
    """Lowest, and one past the highest."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}, e.g. {{choice: [1, 2]}}")
        if self.values is None:
            low, high = self.bounds
            if not low < high:
                raise ValueError(f"{given[0]} needs [lowest, highest] with lowest < highest")
            if self.loguniform and low <= 0:
                raise ValueError("loguniform needs bounds above 0")
        return self

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The listed values; None for a range."""
        return self.choice or self.grid

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest of a range."""
        found = self.uniform or self.loguniform or self.randint
        assert found is not None
        return found

    @property
    def probes(self) -> tuple[Any, ...]:
        """What stands for the domain in checks: all listed values, or both ends of a range and a point between.

        The point is not a round number, so that a float range over an integer setting is detected.
        """
        if self.values is not None:
            return self.values
        low, high = self.bounds
        if self.randint:
            return (low, high - 1)
        return (low, low + (high - low) / math.pi, high)

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of the domain's."""
        if self.values is not None:
            return value in self.values
        if isinstance(value, bool) or not isinstance(value, int if self.randint else (int, float)):
            return False
        low, high = self.bounds
        return low <= value < high if self.randint else low <= value <= high


class Search(Section):
    """How the space is searched."""

    sampler: Literal["random", "grid", "tpe"] = "random"
    """What chooses the values: `random` draws, `grid` runs every combination once.
    `tpe` (Optuna) prefers values near those of good trials."""

    scheduler: Literal["none", "asha", "median", "pbt"] | None = None
    """What stops weak trials early: `asha` at growing numbers of epochs, `median` below the others' median, or `none`.
    With `pbt` weak ones continue from the checkpoints of good ones, with changed values.
    Unset means `none` with `grid` or `search.repeats`, else `asha`."""

    metric: str = "val/AP"
    """The highest value over all epochs of a trial wins."""

    samples: Count | None = None
    """Number of draws; unset means 8 where neither `search.epochs` nor `search.minutes` is given. `grid` has none."""

    epochs: Count | None = None
    """Budget: trials start only while all trials together stay within this many epochs of training.
    One that ended without a score counts with all of its epochs."""

    minutes: float | None = Field(None, gt=0, le=1e6)
    """Budget: no point starts after the sweep has run for so long, over all its starts; begun ones finish."""

    points: tuple[dict[str, Any], ...] = ()
    """Values to try first, in addition to the samples, e.g. `[{optim.lr: 2e-4}]`; what a point leaves out is drawn."""

    repeats: int = Field(1, ge=1, le=1000)
    """Runs of each point, with the seeds `seed`, `seed` + 1 and so on. The sampler and the table use their mean."""

    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the sampler."""

    grace: Count = 1
    """Epochs that every trial gets before a scheduler may stop it; pbt: epochs between two exchanges."""

    reduction: int = Field(3, ge=2, le=LARGEST)
    """asha: one trial of this many continues past a rung."""

    quantile: float = Field(0.25, gt=0, le=0.5)
    """pbt: share of the trials that take the checkpoint of one of as many best trials."""

    concurrent: Count | None = None
    """Trials at a time; unset means as many as fit into the cluster, and never more run."""

    trial_failures: int = Field(1, ge=0, le=LARGEST)
    """How often a failed trial is started again, from its last checkpoint, before it counts as failed."""

    @model_validator(mode="before")
    @classmethod
    def _read_method(cls, tree: Any) -> Any:
        return split_method(tree) if isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sampler == "grid" and self.samples is not None:
            raise ValueError("samples is for random and tpe; grid runs every combination once")
        if self.repeats > 1 and self.early_stop != "none":
            raise ValueError(
                f"repeats compares whole runs, but scheduler {self.early_stop} stops some early; set scheduler: none"
            )
        if self.scheduler == "pbt" and (self.sampler != "random" or self.epochs or self.minutes):
            raise ValueError(
                "scheduler pbt trains a population of samples; set sampler: random, and neither epochs nor minutes"
            )
        return self

    @property
    def early_stop(self) -> str:
        """The scheduler, with its default resolved."""
        return self.scheduler or ("none" if self.sampler == "grid" or self.repeats > 1 else "asha")

    @property
    def draws(self) -> int | None:
        """Number of times that the space is sampled; None if only the other budgets end the search."""
        if self.sampler == "grid":
            return 1
        return self.samples or (None if self.epochs or self.minutes else 8)


def split_method(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The section with an old `method` written as `sampler` and `scheduler`.

    Raises:
        ValueError: an unknown method, or one beside the keys that replace it.
    """
    tree = dict(tree)
    if "method" not in tree:
        return tree
    method = tree.pop("method")
    method = getattr(method, "text", method)  # a scalar of a file or an argument
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; newer files write sampler and scheduler")
    if {"sampler", "scheduler"} & tree.keys():
        raise ValueError("method is the old form of sampler and scheduler; give either it or them")
    tree["sampler"], tree["scheduler"] = METHODS[method]
    return tree

"""A search space: the settings with their values, and the search method. Independent of Ray.

A wrong section is a pydantic ValidationError, which `tune.load` turns into one ConfigError with all faults.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Config, Section, dump, from_dict
from pipeline.config.base import LARGEST, Count

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
KINDS = ("choice", "grid", "uniform", "loguniform", "randint")


class Domain(Section):
    """The values of one setting: exactly one of the kinds."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)  # one of these, drawn for each sample
    grid: tuple[Any, ...] | None = Field(None, min_length=1)  # each of these, for every sample
    uniform: tuple[float, float] | None = None  # lowest and highest
    loguniform: tuple[float, float] | None = None  # the same, uniform in the logarithm
    randint: tuple[Int64, Int64] | None = None  # lowest, and one past the highest

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


class Search(Section):
    """How the space is searched."""

    method: Literal["asha", "random", "grid"] = "asha"  # asha = random draws, weak trials are stopped early
    metric: str = "val/AP"  # highest wins, over all epochs of a trial
    samples: Count | None = None  # draws of asha (8) and random (8); grid has none
    seed: int = Field(0, ge=0, lt=2**32)  # of the draws, by NumPy's RandomState
    grace: Count = 1  # asha: epochs that every trial gets
    reduction: int = Field(3, ge=2, le=LARGEST)  # asha: one of this many continues past a rung
    concurrent: Count | None = None  # trials at a time; unset = as many as fit into the cluster now

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "grid" and self.samples is not None:
            raise ValueError("samples is for asha and random; grid runs every combination once")
        return self

    @property
    def draws(self) -> int:
        """Number of times that the space is sampled."""
        return 1 if self.method == "grid" else self.samples or 8


@dataclass(frozen=True)
class Axis:
    """One searched value and the config keys that get it."""

    keys: tuple[str, ...]
    domain: Domain

    @property
    def label(self) -> str:
        """The axis's name in tables and in Tune."""
        return ", ".join(self.keys)


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    base: Config
    search: Search
    axes: tuple[Axis, ...]

    @property
    def trials(self) -> int:
        """How many trials the sweep runs."""
        return self.search.draws * math.prod(len(axis.domain.grid or (0,)) for axis in self.axes)

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which asha may stop a trial; never the last one, when its run is about to finish."""
        if self.search.method != "asha":
            return ()
        epochs = (self.search.grace * self.search.reduction**step for step in itertools.count())
        return tuple(itertools.takewhile(lambda epoch: epoch < self.base.train.epochs, epochs))

    def config(self, values: Mapping[str, Any], name: str, register: bool = False) -> Config:
        """The base config with `values` (axis label -> value) and another run name.

        Only with `register` is the run registered as the base config says; trials are not registered.

        Raises:
            ConfigError: the values do not fit together.
        """
        tree = dump(self.base)
        for axis in self.axes:
            for key in axis.keys:
                _put(tree, key, values[axis.label])
        tree["name"] = name
        if not register:
            tree["tracking"]["register_as"] = ""
        return from_dict(tree, f"trial {dict(values)}")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree[name]
    tree[leaf] = value

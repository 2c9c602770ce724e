"""A search space: the settings with their values, and how they are searched. Independent of Ray.

The labels of the axes name the values of a trial everywhere: in the ledger, in tables and in `search.points`. Values
that do not fit together are a ConfigError.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import Config, dump, from_dict
from tune.settings import Domain, Search

VARIANT = "variant"  # the label of the axis whose values are named bundles of settings


@dataclass(frozen=True)
class Axis:
    """One searched value and the config keys that get it."""

    keys: tuple[str, ...]
    domain: Domain
    bundles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of the axis `variant`: name -> settings

    @property
    def label(self) -> str:
        """The axis's name in tables and in Tune."""
        return ", ".join(self.keys)

    def settings(self, value: Any) -> dict[str, Any]:
        """The config keys that `value` sets, with their values."""
        return dict(self.bundles[value]) if self.bundles else dict.fromkeys(self.keys, value)


@dataclass(frozen=True)
class Space:
    """A checked space file."""

    base: Config
    search: Search
    axes: tuple[Axis, ...]

    @property
    def crossed(self) -> tuple[tuple[Any, ...], ...]:
        """The values of each axis that is run with every one of them; empty for the axes that are drawn."""
        every = self.search.sampler == "grid"
        return tuple((axis.domain.values if every else axis.domain.grid) or () for axis in self.axes)

    @property
    def points(self) -> int | None:
        """How many points the sweep tries, `search.points` among them; None if only a budget ends it."""
        combinations = math.prod(len(values) or 1 for values in self.crossed)
        if self.search.sampler == "grid":
            return combinations  # the given points are some of these
        draws = self.search.draws
        return None if draws is None else len(self.search.points) + draws * combinations

    @property
    def trials(self) -> int | None:
        """How many trials the sweep runs at most; None if only a budget ends it."""
        return None if self.points is None else self.points * self.search.repeats

    @property
    def longest(self) -> int:
        """The most epochs that a trial may have."""
        key = "train.epochs"
        for axis in self.axes:  # at most one sets it
            lengths = [axis.settings(value).get(key) for value in axis.domain.probes]
            if any(length is not None for length in lengths):
                return max(self.base.train.epochs if length is None else int(length) for length in lengths)
        return self.base.train.epochs

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which asha may stop a trial; never the last one, when its run is about to finish."""
        if self.search.early_stop != "asha":
            return ()
        epochs = (self.search.grace * self.search.reduction**step for step in itertools.count())
        return tuple(itertools.takewhile(lambda epoch: epoch < self.base.train.epochs, epochs))

    def config(self, values: Mapping[str, Any], name: str, register: bool = False, repeat: int = 0) -> Config:
        """The base config with `values` (axis label -> value) and another run name.

        Args:
            values: of every axis.
            name: of the run.
            register: whether the run is registered as the base config says; trials are not registered.
            repeat: added to the base config's seed.

        Raises:
            ConfigError: the values do not fit together.
        """
        tree = dump(self.base)
        for axis in self.axes:
            for key, value in axis.settings(values[axis.label]).items():
                _put(tree, key, value)
        tree["name"] = name
        tree["seed"] += repeat
        if not register:
            tree["tracking"]["register_as"] = ""
        return from_dict(tree, f"trial {dict(values)}")


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        tree = tree[name]
    tree[leaf] = value

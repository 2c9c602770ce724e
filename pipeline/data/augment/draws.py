"""Random numbers for one sample: a function of a key such as (seed, epoch, sample, copy, stream) and nothing else.

Only the raw bits of NumPy's generator are used, because they are the same in all versions. Never fails.
"""

import math

import numpy as np
from numpy.typing import NDArray


class Draws:
    """A stream of random numbers; equal keys give equal streams in every process.

    Args:
        key: non-negative integers; the last one is positive and separates streams of the same sample.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))

    def share(self) -> float:
        """A number in [0, 1)."""
        return (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def happens(self, probability: float) -> bool:
        """True with the given probability."""
        return self.share() < probability

    def between(self, low: float, high: float) -> float:
        """A number in [low, high), evenly spread."""
        return low + self.share() * (high - low)

    def factor(self, low: float, high: float) -> float:
        """A positive factor in [low, high), evenly spread by its logarithm."""
        return math.exp(self.between(math.log(low), math.log(high)))

    def below(self, limit: int) -> int:
        """A whole number in [0, limit)."""
        return (int(self._bits.random_raw()) >> 32) * limit >> 32

    def order(self, count: int) -> list[int]:
        """The numbers below `count` in a random order."""
        order: list[int] = np.argsort(self._bits.random_raw(count), kind="stable").tolist() if count else []
        return order

    def octets(self, count: int) -> NDArray[np.uint8]:
        """`count` random bytes."""
        words = np.atleast_1d(self._bits.random_raw(-(-count // 8))).astype("<u8")
        return words.view(np.uint8)[:count]

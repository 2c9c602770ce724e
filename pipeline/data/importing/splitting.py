"""Takes missing splits from the training images, the same ones on every machine.

Images with equal bytes form a group and stay together, so that no image is trained on and evaluated. Groups are
ordered by their rarest class, then by the hash of their bytes, and dealt out so that at every point of this order each
split is as near as possible to its share. So rare classes reach all splits if they have enough images. Nothing is
raised.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Candidate:
    """One image that a split can get."""

    digest: str  # of its bytes
    classes: frozenset[int]  # of its boxes


def deal_out(candidates: Sequence[Candidate], shares: Mapping[str, Fraction]) -> list[str]:
    """The split of each candidate.

    Args:
        candidates: in any order; the result does not depend on it.
        shares: of each split, in the order of preference where two are equally far behind; the sum is 1.
    """
    counts = Counter(key for one in candidates for key in one.classes)
    groups: dict[str, list[int]] = {}
    for position, one in enumerate(candidates):
        groups.setdefault(one.digest, []).append(position)

    def stratum(digest: str) -> tuple[int, int]:
        """(images, id) of the rarest class of a group; groups without boxes come last."""
        classes = {key for position in groups[digest] for key in candidates[position].classes}
        return min(((counts[key], key) for key in classes), default=(len(candidates) + 1, 0))

    chosen = [""] * len(candidates)
    given = dict.fromkeys(shares, 0)
    seen = 0
    for digest in sorted(groups, key=lambda digest: (stratum(digest), digest)):
        seen += len(groups[digest])
        split = max(shares, key=lambda name: shares[name] * seen - given[name])
        given[split] += len(groups[digest])
        for position in groups[digest]:
            chosen[position] = split
    return chosen

"""What a wrong name probably meant; used for config keys and for sweep spaces."""

from collections.abc import Iterable
from difflib import SequenceMatcher

SEARCH, SPACE = "search", "space"  # the sections of a space file that no config has


def meant(unknown: str, known: Iterable[str]) -> str:
    """Half a sentence on what a key that no config has probably meant."""
    if unknown.partition(".")[0] in (SEARCH, SPACE):
        return "it belongs to the space file of a sweep (tune.sweep), see docs/sweeps.md"
    return f"did you mean '{nearest(unknown, known)}'?"


def nearest(unknown: str, known: Iterable[str]) -> str:
    """The member of `known` that `unknown` most probably meant.

    Likeness of the spelling counts, a shared section (`optim.`) and an abbreviation (`lr` for `learning_rate`) help.
    """
    section, _, name = unknown.rpartition(".")

    def score(candidate: str) -> float:
        its_section, _, its_name = candidate.rpartition(".")
        alike = SequenceMatcher(None, unknown, candidate).ratio() + SequenceMatcher(None, name, its_name).ratio()
        return alike + 0.5 * (section == its_section) + 0.5 * _abbreviates(its_name, name)

    return max(sorted(known), key=score)


def _abbreviates(short: str, long: str) -> bool:
    letters = iter(long)
    return len(short) < len(long) and long[:1] == short[:1] and all(letter in letters for letter in short)

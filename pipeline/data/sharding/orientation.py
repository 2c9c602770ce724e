"""Decides whether the EXIF orientation of a data set's images is applied: one decision for the whole set.

Viewers rotate or mirror such images. Most tools draw boxes on the displayed image; COCO's boxes lie on the stored
pixels. Orientations 5 to 8 swap the sides, so the sizes of image entries show which case it is. Orientations 2 to 4 and
square images keep the size: if no other image decides, the user must. Undecided and contradicting sets are findings
that a build refuses.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.data.images import Size, turned_size
from pipeline.data.sharding.rules import Findings, Rule

Exif = Literal["auto", "apply", "ignore"]
EXIF: tuple[Exif, ...] = get_args(Exif)


@dataclass(frozen=True)
class RotatedImage:
    """An image that viewers rotate or mirror."""

    name: str
    orientation: int  # 2 to 8
    stored: Size
    entry: Size  # size in its image entry

    @property
    def displayed(self) -> Size:
        """(height, width) as viewers show it."""
        return turned_size(self.stored, self.orientation)


def decide(turned: Sequence[RotatedImage], exif: Exif, findings: Findings) -> bool:
    """Decide whether the orientations are applied; contradictions and undecided images become findings."""
    decisive = [one for one in turned if one.stored != one.displayed]
    displayed = [one for one in decisive if one.entry == one.displayed]
    stored = [one for one in decisive if one.entry == one.stored]
    if exif == "auto" and displayed and stored:
        mixed = [f"{len(displayed):,} entries give the displayed size ({displayed[0].name})"]
        mixed += [f"{len(stored):,} the stored one ({stored[0].name})"]
        findings.add_counted(Rule.EXIF_CONTRADICTION, len(displayed + stored), mixed)
    elif exif == "auto" and not displayed and not stored:
        open_ones = [one for one in turned if one.entry == one.stored]
        findings.add_all(Rule.EXIF_UNDECIDED, open_ones, _describe)
    else:
        applied = exif == "apply" or (exif == "auto" and bool(displayed))
        findings.add_all(Rule.EXIF_APPLIED if applied else Rule.EXIF_IGNORED, turned, _describe)
        for one in turned:
            if one.entry != (one.displayed if applied else one.stored):
                _add_size(one, findings)
        return applied
    for one in turned:
        if one.entry not in (one.displayed, one.stored):
            _add_size(one, findings)
    return False


def orientation_advice(orientations: Iterable[int], findings: Findings, command: str) -> list[str]:
    """Advice for a data set whose orientation is undecided; empty for other sets.

    Args:
        orientations: of the images that viewers rotate.
        findings: after `decide`.
        command: the `jobs.lint` command of this data set.
    """
    if not findings.count(Rule.EXIF_UNDECIDED):
        return []
    counts = ", ".join(f"{count:,} of orientation {number}" for number, count in sorted(Counter(orientations).items()))
    return [
        f"do the boxes lie on the images as viewers show them, or as stored? EXIF rotates {counts}",
        f"`{command} --draw FOLDER` draws both ways side by side; then give --exif apply (as shown) or ignore (stored)",
    ]


def _add_size(one: RotatedImage, findings: Findings) -> None:
    (height, width), (shown_height, shown_width) = one.stored, one.displayed
    findings.add(
        Rule.WRONG_SIZE,
        f"{one.name} is {width} x {height} as stored, {shown_width} x {shown_height} as displayed, "
        f"its entry says {one.entry[1]} x {one.entry[0]}",
    )


def _describe(one: RotatedImage) -> str:
    return f"{one.name} ({one.orientation})"

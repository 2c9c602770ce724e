"""What can be wrong or odd with a data set, and what the pipeline does about each: the one list of these rules.

`annotations`, `sources` and `lint` find, `jobs.lint` shows all of it, and `jobs.shard build` refuses what is marked so
here: the two cannot disagree.
"""

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

SHOWN = 5  # examples per finding


class Treatment(Enum):
    """What happens to what was found, strictest first."""

    REFUSE = "refuse"  # nothing is built
    DROP = "drop"  # not trained on; stays in the record, so evaluation sees what pycocotools sees
    CLAMP = "clamp"  # trained on inside of the image; stays in the record as it is
    KEEP = "keep"  # as it is; worth knowing


class Rule(Enum):
    """One kind of finding: its treatment, what it is (after a count), and what to do or what follows from it."""

    EMPTY_LIST = Treatment.REFUSE, "lists without entries", "a data set needs images and categories"
    MALFORMED = Treatment.REFUSE, "entries that lack something", "complete or remove them"
    BAD_ID = Treatment.REFUSE, "ids that are not whole numbers from 0 (image ids: of up to 12 digits)", "renumber"
    REPEATED_CATEGORY = Treatment.REFUSE, "category ids given twice", "ids must be unique; merge or renumber"
    REPEATED_IMAGE = Treatment.REFUSE, "image ids given twice", "ids must be unique; merge or renumber"
    REPEATED_ANNOTATION = Treatment.REFUSE, "annotation ids given twice", "ids must be unique; renumber"
    BAD_FILE_NAME = (
        Treatment.REFUSE,
        "file names that are invalid or leave the image folder",
        "name files inside of it",
    )
    BAD_SIZE = Treatment.REFUSE, "images whose width and height are not valid", "give those of the stored image"
    UNKNOWN_IMAGE = Treatment.REFUSE, "annotations of images that are not listed", "list the images or remove them"
    UNKNOWN_CATEGORY = Treatment.REFUSE, "annotations of categories that are not listed", "list the categories"
    BAD_BOX = Treatment.REFUSE, "boxes that are not four finite numbers x, y, width, height", "fix or remove them"
    BAD_AREA = Treatment.REFUSE, "areas that are not finite numbers", "fix or remove the field"
    BAD_CROWD = Treatment.REFUSE, "iscrowd that is neither 0 nor 1", "fix or remove the field"
    BAD_MASK = Treatment.REFUSE, "crowd masks with values that JSON does not know", "fix or remove the mask"
    BAD_PLACE = Treatment.REFUSE, "sources of images that cannot be used", "give a folder, zip, tar or folder of tars"
    MISSING_FILE = Treatment.REFUSE, "missing image files", "supply them or remove their entries"
    SHARED_IMAGE = (
        Treatment.REFUSE,
        "images that two label files or two paths mean",
        "an image of the same name may be missing: supply it, or remove its labels",
    )
    UNREADABLE_FILE = Treatment.REFUSE, "unreadable image files", "replace them or remove their entries"
    WRONG_SIZE = (
        Treatment.REFUSE,
        "images of another size than their entry",
        "correct one; if EXIF rotates them, use --exif",
    )
    EXIF_CONTRADICTION = (
        Treatment.REFUSE,
        "images that EXIF rotates, some entries with the displayed size, some with the stored one",
        "correct the entries, or split the set by the tool that wrote them",
    )
    EXIF_UNDECIDED = (
        Treatment.REFUSE,
        "images that EXIF rotates or mirrors, and no size shows whether their boxes are rotated",
        "give --exif apply or --exif ignore",
    )
    BAD_LABEL = Treatment.REFUSE, "labels that cannot be read", "fix or remove them"
    UNKNOWN_CLASS = Treatment.REFUSE, "labels of classes that are not listed", "list the classes or remove the labels"
    NOT_NORMALIZED = (
        Treatment.REFUSE,
        "YOLO labels with coordinates outside of 0 to 1",
        "divide them by the image's width and height",
    )
    SHARES = (
        Treatment.REFUSE,
        "lists of boxes that all end within a pixel of the corner, so they are shares of the image",
        "multiply them by the image's width and height",
    )
    SWAPPED_CORNERS = Treatment.REFUSE, "boxes whose minimum is above their maximum", "swap or remove them"
    NO_IMAGES = Treatment.REFUSE, "data sets without an image that can be used", "export it with its images"
    NO_BOXES = (
        Treatment.REFUSE,
        "data sets without any box",
        "is it another layout (--format), or all iscrowd 1?",
    )
    NO_AREA = Treatment.DROP, "boxes without width or height", "not trained on, as in the published recipe"
    OUTSIDE = Treatment.DROP, "boxes with nothing inside of their image", "not trained on; is it x, y, width, height?"
    CROSSES_EDGE = (
        Treatment.CLAMP,
        "boxes that leave their image",
        "trained on clamped to it; if most do: is it x, y, width, height?",
    )
    EMPTY_SPLIT = Treatment.KEEP, "splits without images", "left out"
    EMPTY_LABELS = Treatment.KEEP, "splits without any box", "kept, but AP on them says nothing"
    MISSING_LABEL = Treatment.KEEP, "names in the list of a split without a label file", "left out"
    LABEL_WITHOUT_IMAGE = Treatment.KEEP, "label files without an image", "left out"
    SHAPE_WITHOUT_AREA = Treatment.KEEP, "points and lines, which have no box", "left out"
    ROTATED_BOX = Treatment.KEEP, "boxes that CVAT has rotated (`rotation` of their attributes)", "the box around each"
    DIFFICULT = Treatment.KEEP, "objects marked as difficult", "trained on and evaluated as all others"
    COUNTS_FROM_0 = (
        Treatment.KEEP,
        "data sets whose VOC coordinates count from 0, as a file shows",
        "read as the edges of boxes, not as numbers of pixels from 1",
    )
    CROWD = (
        Treatment.KEEP,
        "crowd regions (iscrowd 1)",
        "not trained on; if they are single objects, such as the masks of CVAT, set iscrowd to 0",
    )
    CROWD_WITHOUT_RLE = Treatment.KEEP, "crowd regions without RLE", "not trained on; AP of boxes needs only the box"
    QUOTED_NUMBER = Treatment.KEEP, "annotations with numbers in quotes", "read as numbers"
    AREA_NOT_POSITIVE = Treatment.KEEP, "areas of 0 or less, though the box has area", "AP_small ... use this field"
    ID_ZERO = Treatment.KEEP, "ids that start at 0", "kept; evaluation numbers annotations from 1"
    REPEATED_LISTING = Treatment.KEEP, "images that a split lists twice", "used once"
    EXACT_DUPLICATE = (
        Treatment.KEEP,
        "images that are in two splits, byte by byte",
        "AP is too high: remove them from one of the splits",
    )
    NEAR_DUPLICATE = (
        Treatment.KEEP,
        "images with a near duplicate in another split",
        "AP may be too high: keep frames of a scene and copies of an image in one split",
    )
    REPEATED_FILE_NAME = Treatment.KEEP, "file names used by several images", "each image is a sample of its own"
    REPEATED_NAME = Treatment.KEEP, "category names used twice", "kept as separate classes"
    UNLISTED_FILE = Treatment.KEEP, "image files that no entry lists", "left out"
    ALPHA = Treatment.KEEP, "images with transparency", "it is dropped: transparent pixels show the colour below it"
    DEEP_IMAGE = Treatment.KEEP, "images of 16 bits (their values)", "scaled to 8 bits by the range of their type"
    DARK_IMAGE = (
        Treatment.KEEP,
        "images of 16 bits that use less than a sixteenth of them (their values)",
        "scaled to 8 bits by their own range",
    )
    CONVERTED = Treatment.KEEP, "images in WebP, BMP or TIFF", "stored as PNG, with the same pixels"
    EXIF_APPLIED = Treatment.KEEP, "images that EXIF rotates or mirrors", "rotated when read, as their boxes are"
    EXIF_IGNORED = Treatment.KEEP, "images that EXIF rotates or mirrors", "read as stored, as their boxes are"
    EMPTY_IMAGE = Treatment.KEEP, "images without a box to train on", "kept as background, as in the published recipe"
    UNUSED_CATEGORY = Treatment.KEEP, "categories without a box to train on", "never learned; --drop-unused drops them"
    NEVER_TRAINED = (
        Treatment.KEEP,
        "categories with boxes in val or test, and none in train",
        "never learned, so their AP is 0: move images to train, or leave the class out",
    )
    DROPPED_CATEGORY = Treatment.KEEP, "categories without a box in any split", "dropped, as --drop-unused asks"
    CATEGORY_GAPS = Treatment.KEEP, "gaps in the category ids", "labels are numbered without gaps by default"

    def __init__(self, treatment: Treatment, what: str, does: str) -> None:
        self.treatment, self.what, self.does = treatment, what, does


class Findings:
    """The number of findings of each rule, with the first examples."""

    def __init__(self) -> None:
        self._found: dict[Rule, tuple[int, list[str]]] = {}

    def add(self, rule: Rule, example: str) -> None:
        """Add one finding."""
        self.add_all(rule, (example,), str)

    def add_all(self, rule: Rule, items: Sequence[Any], describe: Callable[[Any], str]) -> None:
        """Add one finding for each item; only shown items are described."""
        self.add_counted(rule, len(items), [describe(item) for item in items[:SHOWN]])

    def add_counted(self, rule: Rule, count: int, examples: Sequence[str]) -> None:
        """Add `count` findings with these examples; nothing if it is 0."""
        if count:
            before, shown = self._found.get(rule, (0, []))
            self._found[rule] = (before + count, [*shown, *examples][:SHOWN])

    def count(self, rule: Rule) -> int:
        """The number of findings of a rule."""
        return self._found.get(rule, (0, []))[0]

    def merge(self, other: "Findings", source: str = "") -> None:
        """Add the findings of another object; examples name the `source` of these findings, if there is one."""
        for rule, count, examples in other:
            self.add_counted(rule, count, [f"{source}: {example}" if source else example for example in examples])

    def __iter__(self) -> Iterator[tuple[Rule, int, list[str]]]:
        """(rule, count, examples) in the order of the rules."""
        for rule in Rule:
            if rule in self._found:
                yield rule, *self._found[rule]

    def refused(self) -> list[str]:
        """One sentence for each found rule that a build refuses; empty if the build may continue."""
        return [
            f"{rule.what} ({count:,}): {_examples(count, examples)}; {rule.does}"
            for rule, count, examples in self
            if rule.treatment is Treatment.REFUSE
        ]

    def verdict(self) -> str:
        """What a build does with the data set."""
        faults = len(self.refused())
        return f"a build refuses them, see the {faults} lines marked `refuse`" if faults else "a build accepts them"

    def table(self) -> list[str]:
        """For each found rule a line and a line of examples."""
        lines = []
        for rule, count, examples in self:
            lines.append(f"{count:9,}  {rule.treatment.value:7} {rule.what}; {rule.does}")
            lines.append(f"{'':19}{_examples(count, examples)}")
        return ["    count  done to what", *lines] if lines else []


def _examples(count: int, examples: list[str]) -> str:
    return ", ".join(examples) + (", ..." if count > len(examples) else "")

"""Reads and checks a COCO annotation file (`instances_*.json`, or another file in the same format).

The file is read element by element, and only the fields of a record are kept. So COCO's 118,287 images take some
hundred MB and not the gigabytes of their polygons. Training and box AP need no polygons; the RLE of crowd regions is
kept. Everything wrong or unusual is a finding of `rules`; `read_coco` raises AnnotationError for those that a build
refuses.
"""

import dataclasses
import json
import shlex
import unicodedata
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pipeline.data.images import MAX_PIXELS, turned_size
from pipeline.data.index import INDEX, Category
from pipeline.data.sharding.columns import Columns, is_id
from pipeline.data.sharding.json_stream import JsonLists
from pipeline.data.sharding.refused import Refused, whole_ids
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.errors import AnnotationError
from pipeline.progress import Progress

MAX_IMAGE_ID = 10**12 - 1  # member names have 12 digits
LISTS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class CocoImage:
    """One image entry, and the `.json` member of its sample."""

    id: int
    file_name: str
    width: int
    height: int
    record: bytes  # JSON: image_id, width, height and annotations; also orientation if it is not 1
    orientation: int = 1  # applied by readers (EXIF); width, height and boxes are of the displayed image

    def with_orientation(self, orientation: int) -> Self:
        """The same image with an orientation, 2 to 8, for readers to apply."""
        tail = f',"width":{self.width}}}'.encode()
        record = self.record.removesuffix(tail) + f',"orientation":{orientation}'.encode() + tail
        return dataclasses.replace(self, record=record, orientation=orientation)

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height, width) of the image as stored."""
        return turned_size((self.height, self.width), self.orientation)

    @property
    def annotations(self) -> list[dict[str, Any]]:
        """Dicts of id, category_id, bbox (xywh, unchanged), area, iscrowd and a crowd's segmentation; sorted by id."""
        return list(json.loads(self.record)["annotations"])


@dataclass(frozen=True)
class CocoSource:
    """The usable entries of an annotation file: categories and images in ascending order of id."""

    digest: str  # sha256 of the file
    categories: tuple[Category, ...]
    images: tuple[CocoImage, ...]
    refused_files: frozenset[str] = frozenset()  # names without folders, of image entries that cannot be used
    used: frozenset[int] = frozenset()  # ids of categories with a box to train on, or with a refused annotation


def read_coco(path: Path, limit: int | None = None) -> CocoSource:
    """Read and check the file; `limit` keeps the first images by id.

    Raises:
        AnnotationError: the file is not readable, not COCO JSON, or has no images, or a build refuses it; one message
            lists all findings.
    """
    source, findings = inspect_coco(path, limit)
    refuse(path, findings)
    return source


class Collector:
    """Checks the entries of a COCO file one by one (`add`); `finish` checks the whole and makes the records."""

    def __init__(self, *, named: bool = False) -> None:
        """`named` findings show file names, for data whose ids its owner does not know."""
        self.findings, self._columns, self._named = Findings(), Columns(), named
        self._images: dict[int, tuple[str, int, int]] = {}  # file name, height, width
        self._categories: dict[int, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, entry: Any) -> None:
        """Add an entry of one of LISTS, or a finding."""
        self._counts[kind] += 1
        position, refused = self._counts[kind], self._columns.refused
        if kind == "annotations":
            self._columns.add(entry, position, self.findings)
        elif kind == "images":
            if not _add_image(self._images, entry, position, self.findings):
                refused.add_image(entry)
        elif not _add_category(self._categories, entry, position, self.findings):
            refused.add_category(entry)

    def finish(self, digest: str, limit: int | None = None, optional: bool = False) -> CocoSource:
        """The usable entries; `limit` keeps the first images by id. An `optional` file need not have images."""
        findings, refused, images = self.findings, self._columns.refused, self._images
        empty = [kind for kind in ("images", "categories") if not self._counts[kind]]
        if optional and "images" in empty:
            findings.add(Rule.EMPTY_SPLIT, "no image is listed")
        else:
            findings.add_all(Rule.EMPTY_LIST, empty, str)
        names = {key: self._categories[key] for key in sorted(self._categories)}
        _check_lists(images, names, refused, findings)
        sizes = {key: images[key][1:] for key in sorted(images)}
        files = {key: image[0] for key, image in images.items()} if self._named else None
        used = self._columns.check(sizes, names, findings, files)
        entries = zip(sizes.items(), self._columns.records(sizes, limit), strict=False)
        found = tuple(CocoImage(key, images[key][0], width, height, text) for (key, (height, width)), text in entries)
        kinds = tuple(Category(key, name) for key, name in names.items())
        return CocoSource(digest, kinds, found, frozenset(refused.files), used)


def inspect_coco(path: Path, limit: int | None = None) -> tuple[CocoSource, Findings]:
    """Read the file as `read_coco` does, without faulty entries; returns also all findings.

    Raises:
        AnnotationError: the file is not readable or not COCO JSON.
    """
    collector = Collector()
    try:
        with path.open("rb") as file, Progress(path.stat().st_size, "reading annotations", "MiB", 2**20) as bar:
            lists = JsonLists(file, LISTS, bar.advance)
            for kind, entry in lists:
                collector.add(kind, entry)
    except IsADirectoryError:
        raise AnnotationError(_explain_folder(path)) from None
    except OSError as error:
        raise AnnotationError(f"cannot read annotations {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path} is not a COCO annotation file: {error}") from None
    if missing := [kind for kind in LISTS if kind not in lists.found]:
        raise AnnotationError(f"{path} is not a COCO annotation file: it has no list of {', '.join(missing)}")
    source = collector.finish(lists.digest, limit)
    add_unused(source.categories, source.used, collector.findings)
    return source, collector.findings


def add_unused(categories: Sequence[Category], used: Set[int], findings: Findings) -> None:
    """Add a finding for each category whose id is not in `used`."""
    unused = [category for category in categories if category.id not in used]
    findings.add_all(Rule.UNUSED_CATEGORY, unused, lambda category: f"{category.id} ({category.name})")


def refuse(path: Path, findings: Findings, images: str = "", advice: Sequence[str] = ()) -> None:
    """Raise AnnotationError, with `advice` at its end, if there are findings that a build refuses."""
    if faults := findings.refused():
        raise AnnotationError(refusal(str(path), lint_command(path, images), [*faults, *advice]))


def refusal(path: str, command: str, lines: Sequence[str]) -> str:
    """The message for a data set with faults, which `command` shows in full."""
    return "\n  ".join([f"{path} has faults (`{command}` shows all):", *lines])


def lint_command(path: Path, images: str | None) -> str:
    """The command that shows all findings of a data set."""
    return shlex.join(["python", "-m", "jobs.lint", str(path), *([images] if images else [])])


def _add_image(images: dict[int, tuple[str, int, int]], entry: Any, position: int, findings: Findings) -> bool:
    """Add an image entry, or a finding; returns whether the entry is usable."""
    if not _is_complete("image", entry, ("id", "file_name", "width", "height"), position, findings):
        return False
    own, name, height, width = entry["id"], entry["file_name"], entry["height"], entry["width"]
    if not is_id(own, MAX_IMAGE_ID):
        findings.add(Rule.BAD_ID, f"image id {own!r:.30}")
    elif own in images:
        findings.add(Rule.REPEATED_IMAGE, str(own))
    elif not _stays_inside(name):
        findings.add(Rule.BAD_FILE_NAME, f"{name!r:.100} of image {own}")
    elif type(width) is not int or type(height) is not int or min(width, height) < 1 or width * height > MAX_PIXELS:
        large = type(width) is type(height) is int and min(width, height) > 0
        why = f": more than {MAX_PIXELS:,} pixels, scale it down" if large else ""
        findings.add(Rule.BAD_SIZE, f"image {own}, {name:.100} ({width!r:.30} x {height!r:.30}{why})")
    else:
        images[own] = (name, height, width)
        return True
    return False


def _add_category(categories: dict[int, str], entry: Any, position: int, findings: Findings) -> bool:
    """Add a category entry, or a finding; returns whether the entry is usable."""
    if not _is_complete("category", entry, ("id", "name"), position, findings):
        return False
    own, name = entry["id"], str(entry["name"])
    if not is_id(own):
        findings.add(Rule.BAD_ID, f"category id {own!r:.30}")
    elif own in categories:
        findings.add(Rule.REPEATED_CATEGORY, str(own))
    elif not _is_text(name):
        findings.add(Rule.MALFORMED, f"category {own} has a name that is not Unicode text")
    else:
        categories[own] = name
        return True
    return False


def _is_complete(kind: str, entry: Any, names: tuple[str, ...], position: int, findings: Findings) -> bool:
    lacks = [name for name in names if not isinstance(entry, dict) or name not in entry]
    if lacks:
        findings.add(Rule.MALFORMED, f"{kind} number {position} has no {', '.join(lacks)}")
    return not lacks


def _stays_inside(name: Any) -> bool:
    """Whether this names a file below the image folder."""
    if not isinstance(name, str) or "\0" in name or not _is_text(name):
        return False
    pure = PurePosixPath(name)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts


def _is_text(text: str) -> bool:
    """Whether the text can be encoded: JSON may hold half of a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _explain_folder(path: Path) -> str:
    """The message for a folder: what to give instead."""
    if (path / INDEX).is_file():
        return f"{path} is a folder, maybe of shards (`python -m jobs.shard info {path}`); give a COCO JSON file"
    found = min((str(file) for file in path.glob("*.json")), default="")
    return f"{path} is a folder; ANNOTATIONS is one COCO JSON file" + (f", such as {found}" if found else "")


def _check_lists(
    images: dict[int, tuple[str, int, int]], categories: dict[int, str], refused: Refused, findings: Findings
) -> None:
    names = Counter(name for name, _, _ in images.values())
    findings.add_all(Rule.REPEATED_FILE_NAME, [name for name, count in names.items() if count > 1], repr)
    labels = Counter(unicodedata.normalize("NFC", name) for name in categories.values())
    findings.add_all(Rule.REPEATED_NAME, [name for name, count in labels.items() if count > 1], repr)
    for kind, ids in (("image", images), ("category", categories)):
        if 0 in ids:
            findings.add(Rule.ID_ZERO, f"{kind} id 0")
    ordered = sorted({*categories, *whole_ids(refused.categories)})
    for before, after in pairwise(ordered):
        if after > before + 1:
            findings.add(Rule.CATEGORY_GAPS, str(before + 1) if after == before + 2 else f"{before + 1} to {after - 1}")

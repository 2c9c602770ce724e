"""What readers of layouts make: splits whose entries are those of a COCO file, and images found by their names.

`Finder` finds the image that an annotation means, though tools write its path as it was on another machine. An image
of the same name in another folder is not taken for one that is missing. Two images that fit equally well are an
AnnotationError.
"""

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from urllib.parse import unquote

from pipeline.data.importing.tree import Tree, split_of, split_of_path
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.errors import AnnotationError

CocoEntry = tuple[str, Any]  # its list (`annotations.LISTS`), and the element as JSON has it


@dataclass(frozen=True)
class Split:
    """One split of a data set, or all of it."""

    name: str | None  # `train`, `val` or `test`; None where the layout names no split
    entries: Callable[[], Iterator[CocoEntry]]  # from the start at each call; file names are those of the tree
    categories: Callable[[], dict[int, str]]  # names by id
    origin: str = ""  # the annotation file, if there is one


class Layout(Protocol):
    """A way to store a data set."""

    name: str  # for --format
    title: str

    def find(self, tree: Tree) -> list[str]:
        """Files that only this layout has; empty if it is another one."""
        ...

    def read(self, tree: Tree, exif: Exif, findings: Findings) -> list[Split]:
        """The splits. What is wrong with single labels is added to the findings; what stops reading is raised.

        Raises:
            AnnotationError: a file cannot be read.
        """
        ...


@dataclass(frozen=True)
class Box:
    """One object: its edges in pixels from 0, before it is rotated."""

    category: int
    left: float
    top: float
    right: float
    bottom: float
    rotation: float = 0.0  # degrees around its centre


@dataclass(frozen=True)
class LabelledImage:
    """One image with its objects; `file_name` is the tree's."""

    file_name: str
    height: int
    width: int
    boxes: tuple[Box, ...]


def make_splits(images: Mapping[str | None, Sequence[LabelledImage]], categories: dict[int, str]) -> list[Split]:
    """Splits of labelled images: image ids from 1 by name over all splits, annotation ids from 1 in each split.

    Images of no split are left out where others have one.
    """
    if len(images) > 1:
        images = {name: split for name, split in images.items() if name is not None}
    names = sorted({image.file_name for split in images.values() for image in split})
    ids = {name: number for number, name in enumerate(names, start=1)}

    def entries_of(split: Sequence[LabelledImage]) -> Iterator[CocoEntry]:
        for key, name in categories.items():
            yield "categories", {"id": key, "name": name}
        annotation = 0
        for image in sorted(split, key=lambda image: image.file_name):
            own = ids[image.file_name]
            size = {"width": image.width, "height": image.height}
            yield "images", {"id": own, "file_name": image.file_name, **size}
            for box in image.boxes:
                annotation += 1
                bbox = [box.left, box.top, box.right - box.left, box.bottom - box.top]
                entry: dict[str, Any] = {"id": annotation, "image_id": own, "category_id": box.category}
                if box.rotation:
                    entry["attributes"] = {"rotation": box.rotation}
                yield "annotations", entry | {"bbox": [round(value, 3) for value in bbox]}

    return [Split(name, partial(entries_of, split), lambda: categories) for name, split in images.items()]


class Finder:
    """Finds images of a tree by the names that label files give."""

    def __init__(self, tree: Tree) -> None:
        self._where = tree.where
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._endings: set[tuple[str, ...]] = {()}  # of the paths of folders with images
        beside: dict[str, str] = {}  # folder of each image by its path without suffix
        for image in tree.images:
            folder, _, last = image.rpartition("/")
            self._by_name[last].append(image)
            self._by_stem[last.rpartition(".")[0]].append(image)
            beside[image.rpartition(".")[0]] = folder
        for folder in set(beside.values()):
            parts = tuple(folder.split("/"))
            self._endings |= {parts[start:] for start in range(len(parts))}
        labels = (name.rpartition(".") for name in tree.entries)
        self._labelled = {(beside[path], suffix) for path, _, suffix in labels if path in beside}

    def named(self, name: str, source: str, split: str | None = None) -> str | None:
        """The image that a file `source` of the tree calls `name`; None if there is none."""
        for spelling in (name, unquote(name)):  # Label Studio quotes names as in URLs
            parts = _parts_of(spelling)
            if parts and (image := self._closest(self._by_name.get(parts[-1], ()), parts, source, split)):
                return image
        return None

    def beside(self, source: str, split: str | None = None) -> str | None:
        """The image whose name without suffix is that of a file `source` of the tree; None if there is none."""
        stem = source.rpartition("/")[2].rpartition(".")[0]
        return self._closest(self._by_stem.get(stem, ()), [], source, split)

    def _closest(self, found: Iterable[str], parts: list[str], source: str, split: str | None) -> str | None:
        """The candidate that shares the longest end with `parts`, then the split, then the folders with `source`."""
        split = split or split_of_path(source)
        folders = source.split("/")[:-1]
        least, below = self._limits(parts, source)
        scored: list[tuple[tuple[int, bool, int], str]] = []
        for candidate in found:
            path, own = candidate.split("/"), split_of_path(candidate)
            ending = _count_equal(reversed(path), reversed(parts))
            if ending < least or not candidate.startswith(below):
                continue  # an image of another folder has the same name, and the one of this folder is missing
            if own and split and own != split and ending < 2:
                continue  # an image of another split has the same name, and the one of this split is missing
            scored.append(((ending, own == split, _count_equal(path, folders)), candidate))
        if not scored:
            return None
        best = max(score for score, _ in scored)
        chosen = [candidate for score, candidate in scored if score == best]
        if len(chosen) > 1:
            raise AnnotationError(
                f"{source} in {self._where} may mean {chosen[0]} or {chosen[1]}; give each split a folder, or its "
                "images different names"
            )
        return chosen[0]

    def _limits(self, parts: list[str], source: str) -> tuple[int, str]:
        """How many last parts of `parts` the path of an image must share, and how it must begin.

        If a folder that `parts` names is in the tree, the image is in that folder. If `parts` names no folder, and
        images of the folder of `source` have such files beside them, the image is in or below that folder.
        """
        named = [start for start in range(len(parts)) if tuple(parts[start:-1]) in self._endings]
        folder, suffix = source.rpartition("/")[0], source.rpartition(".")[2]
        beside = folder and len(parts) <= 1 and (folder, suffix) in self._labelled
        return len(parts) - min(named, default=0), f"{folder}/" if beside else ""


def same_end(one: str, other: str) -> bool:
    """Whether one path is the other, or its end, as in `/data/a.jpg` and `a.jpg`, however the two are written."""
    return any(
        (count := min(len(first), len(second))) and first[-count:] == second[-count:]
        for first in map(_parts_of, (one, unquote(one)))
        for second in map(_parts_of, (other, unquote(other)))
    )


def find_shared(labels: Mapping[str, str], findings: Findings) -> set[str]:
    """The label files of images that an earlier one has labelled, with findings; `labels` has the image of each."""
    first: dict[str, str] = {}
    shared = set()
    for name, image in labels.items():
        if (before := first.setdefault(image, name)) != name:
            findings.add(Rule.SHARED_IMAGE, f"{image} by {before} and {name}")
            shared.add(name)
    return shared


def stem_of(name: str) -> str:
    """The last part of a path without its suffix."""
    last = name.rpartition("/")[2]
    return last.rpartition(".")[0] or last


def split_of_file(name: str) -> str | None:
    """The split that a file is named after, such as `instances_val2017.json`; else that of its folder."""
    words = {word for word in map(split_of, stem_of(name).replace("-", "_").replace(".", "_").split("_")) if word}
    return words.pop() if len(words) == 1 else split_of_path(name)


def _parts_of(path: str) -> list[str]:
    """Folders and name of a path of any machine."""
    text = unicodedata.normalize("NFC", path).replace("\\", "/")
    return [part for part in text.split("/") if part not in ("", ".", "..")]


def _count_equal(one: Iterable[str], other: Iterable[str]) -> int:
    """How many elements two sequences have in common at their start."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count

r"""Reads COCO JSON as Roboflow, CVAT, Label Studio and COCO itself lay it out.

Roboflow puts `_annotations.coco.json` beside the images of each split. CVAT writes
`annotations/instances_SUBSET.json` and `images/SUBSET/`; COCO the same with `train2017/`. Label Studio writes
`result.json` and `images/`, with file names that may be paths of its server (`images\5e1b8b8d-x.jpg`) and sizes that
may be null. Of CVAT's `attributes` the rotation counts. Captions and image infos beside instances are left alone.
A file that is broken, or two of one split, are AnnotationErrors.
"""

import contextlib
import re
from collections.abc import Iterator, Set
from functools import partial
from typing import Any

from pipeline.data.importing.records import CocoEntry, Finder, Split, same_end, split_of_file
from pipeline.data.importing.tree import HEAD_BYTES, Tree
from pipeline.data.sharding.annotations import LISTS
from pipeline.data.sharding.json_stream import JsonLists
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.errors import AnnotationError, ShardError

CONTENT = re.compile(r'"(images|annotations)"\s*:\s*\[')
LABELME = re.compile(r'"(imagePath|imageData)"\s*:|"shapes"\s*:\s*[\[{]')
PREFERRED = ("instances", "_annotations.coco")  # beginnings of file names that other COCO files (captions) do not have
OTHER_TASKS = ("captions", "image_info", "person_keypoints", "panoptic", "stuff")  # of files beside them


class CocoLayout:
    """COCO JSON files and their images."""

    name = "coco"
    title = "COCO JSON"

    def find(self, tree: Tree) -> list[str]:
        """See `Layout`."""
        found = [name for name in tree.names(".json") if _is_coco(tree, name)]
        for beginning in PREFERRED:
            if splits := {split_of_file(name) for name in found if _begins(name, beginning)}:
                return [name for name in found if _begins(name, beginning) or _is_of_another_split(name, splits)]
        return found

    def read(self, tree: Tree, exif: Exif, findings: Findings) -> list[Split]:
        """See `Layout`."""
        files: dict[str | None, str] = {}
        for name in self.find(tree):
            split = split_of_file(name)
            if split in files:
                what = f"two annotation files for {split}" if split else "two annotation files without a split's name"
                raise AnnotationError(
                    f"{tree.where} has {what}: {files[split]} and {name}; name them after train, val and test, or "
                    "build from ANNOTATIONS and IMAGES"
                )
            files[split] = name
        if None in files and len(files) > 1:
            raise AnnotationError(
                f"{tree.where} has annotation files with and without a split's name, such as {files[None]}; remove "
                "one kind, or build from ANNOTATIONS and IMAGES"
            )
        images = _Images(tree, exif, findings)
        return [
            Split(
                split,
                partial(_read_entries, tree, name, split, images),
                partial(_read_categories, tree, name),
                name,
            )
            for split, name in files.items()
        ]


def _begins(name: str, *beginnings: str) -> bool:
    return name.rpartition("/")[2].startswith(beginnings)


def _is_of_another_split(name: str, splits: Set[str | None]) -> bool:
    """Whether a file beside those of `splits` may hold the boxes of another split."""
    return None not in splits and split_of_file(name) not in {*splits, None} and not _begins(name, *OTHER_TASKS)


def _is_coco(tree: Tree, name: str) -> bool:
    head = tree.head(name)
    if not head.lstrip().startswith("{") or LABELME.search(head):
        return False
    long = len(head) >= HEAD_BYTES // 2  # the lists may come after a long list of categories
    return bool(CONTENT.search(head)) or (long and '"categories"' in head)


def _read_entries(tree: Tree, name: str, split: str | None, images: "_Images") -> Iterator[CocoEntry]:
    """Raises AnnotationError."""
    for kind, entry in _read_lists(tree, name):
        yield kind, images.locate(entry, name, split) if kind == "images" else entry


def _read_lists(tree: Tree, name: str) -> Iterator[CocoEntry]:
    stream = tree.stream(name)
    lists = JsonLists(stream, LISTS)
    try:
        yield from lists
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{name} in {tree.where} is not text in UTF-8 ({error}); save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{name} in {tree.where} is not a COCO annotation file: {error}") from None
    except ShardError as error:
        raise AnnotationError(f"{name} in {tree.where} {error}") from None
    finally:
        stream.close()
    if missing := [kind for kind in LISTS if kind not in lists.found]:
        raise AnnotationError(f"{name} in {tree.where} has no list of {', '.join(missing)}")


def _read_categories(tree: Tree, name: str) -> dict[int, str]:
    entries = (entry for kind, entry in _read_lists(tree, name) if kind == "categories" and isinstance(entry, dict))
    return {entry["id"]: str(entry["name"]) for entry in entries if type(entry.get("id")) is int and "name" in entry}


class _Images:
    """Finds the images of entries, of all annotation files of a tree."""

    def __init__(self, tree: Tree, exif: Exif, findings: Findings) -> None:
        self._tree, self._exif, self._findings = tree, exif, findings
        self._finder = Finder(tree)
        self._paths: dict[str, str] = {}  # by image, the first path that means it

    def locate(self, entry: Any, name: str, split: str | None) -> Any:
        """The image entry of file `name` with the tree's name of its image, and with its size if the tool gave none."""
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            return entry
        written = entry["file_name"]
        image = self._finder.named(written, name, split)
        if image is None:
            return entry
        before = self._paths.setdefault(image, written)
        if not same_end(before, written):
            self._findings.add(Rule.SHARED_IMAGE, f"{image} by {before:.100} and {written:.100} of {name}")
        found = entry | {"file_name": image}
        if not entry.get("width") or not entry.get("height"):
            with contextlib.suppress(ShardError):  # the size is a finding, and so is the image
                found["height"], found["width"] = self._tree.image_size(image, self._exif)
        return found

"""Reads Pascal VOC XML: the development kit's folders, CVAT's and Label Studio's copies of them, Roboflow's files.

The kit numbers pixels from 1 and includes both corners, so a box from 1 to the width covers the image. Other tools,
such as CVAT, write edges from 0. A corner below 1 shows which of the two holds, for the whole data set.
Splits are `ImageSets/Main/train.txt`, `val.txt` and `test.txt`, else folders; `trainval.txt` is train where train and
val are missing. Files with a document type or entities, which no tool writes, are findings.
"""

import contextlib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.importing.records import Box, Finder, LabelledImage, Split, find_shared, make_splits, stem_of
from pipeline.data.importing.tree import Tree, split_of, split_of_path
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.errors import AnnotationError, ShardError

SETS = "ImageSets/Main/"
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class _Page:
    """What one XML file says."""

    file: str
    image: str  # the tree's name of its image
    size: tuple[int, int] | None  # (height, width)
    objects: tuple[tuple[str, tuple[float, float, float, float], float], ...]  # class, corners as written, rotation


class VocLayout:
    """An XML file per image."""

    name = "voc"
    title = "Pascal VOC"

    def find(self, tree: Tree) -> list[str]:
        """See `Layout`."""
        return [name for name in tree.names(".xml") if _is_voc(tree.head(name))]

    def read(self, tree: Tree, exif: Exif, findings: Findings) -> list[Split]:
        """See `Layout`."""
        finder = Finder(tree)
        pages = [page for name in self.find(tree) if (page := _read_page(tree, name, finder, findings))]
        shared = find_shared({page.file: page.image for page in pages}, findings)
        pages = [page for page in pages if page.file not in shared]
        zero = next((page.file for page in pages if any(min(box[:2]) < 1 for _, box, _ in page.objects)), None)
        if zero is not None:
            findings.add(Rule.COUNTS_FROM_0, zero)
        names = sorted({name for page in pages for name, *_ in page.objects})
        numbers = {name: number for number, name in enumerate(names, start=1)}
        labelled: dict[str | None, list[LabelledImage]] = {}
        for split, members in _split_pages(tree, pages, findings).items():
            labelled[split] = []
            for page in members:
                try:
                    height, width = page.size or tree.image_size(page.image, exif)
                except ShardError as error:
                    findings.add(Rule.UNREADABLE_FILE, f"{page.image} {error}")
                    continue
                first = 0 if zero is not None else 1
                boxes = [
                    Box(numbers[name], left - first, top - first, right, bottom, rotation)
                    for name, (left, top, right, bottom), rotation in page.objects
                ]
                labelled[split].append(LabelledImage(page.image, height, width, tuple(boxes)))
        return make_splits(labelled, {number: name for name, number in numbers.items()})


def _is_voc(head: str) -> bool:
    return "<annotation>" in head or "<annotation " in head


def _read_page(tree: Tree, name: str, finder: Finder, findings: Findings) -> _Page | None:
    """Read one file; None with a finding if it or its image cannot be used."""
    data = tree.read(name)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        findings.add(Rule.BAD_LABEL, f"{name} has a document type")
        return None
    try:
        root = ElementTree.fromstring(data)  # without document type there are no entities
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        findings.add(Rule.BAD_LABEL, f"{name} is not XML: {error}")
        return None
    written = (root.findtext("filename") or "").strip()
    named = written if stem_of(written) == stem_of(name) else None  # else the image has been renamed
    image = (finder.named(named, name) if named else None) or finder.beside(name) or finder.named(written, name)
    if image is None:
        findings.add(Rule.MISSING_FILE, f"{written or stem_of(name):.100} of {name}")
        return None
    objects = []
    for number, element in enumerate(root.findall("object"), start=1):
        where = f"{name} object {number}"
        label = (element.findtext("name") or "").strip()
        corners = _read_corners(element)
        if not label or corners is None:
            findings.add(Rule.BAD_LABEL, f"{where} has no {'corners in bndbox' if label else 'name'}")
        elif corners[0] > corners[2] or corners[1] > corners[3]:
            findings.add(Rule.SWAPPED_CORNERS, f"{where}: {', '.join(f'{c:g}' for c in corners)}")
        else:
            objects.append((label, corners, _read_rotation(element)))
            if (element.findtext("difficult") or "").strip() == "1":
                findings.add(Rule.DIFFICULT, where)
    return _Page(name, image, _read_size(root), tuple(objects))


def _read_corners(element: ElementTree.Element) -> tuple[float, float, float, float] | None:
    try:
        left, top, right, bottom = (float(element.findtext(f"bndbox/{corner}") or "") for corner in CORNERS)
    except ValueError:
        return None
    return (left, top, right, bottom) if all(abs(c) < 1e9 for c in (left, top, right, bottom)) else None


def _read_rotation(element: ElementTree.Element) -> float:
    """Degrees that CVAT has written beside an unrotated box; else 0."""
    for attribute in element.iterfind("attributes/attribute"):
        if attribute.findtext("name") == "rotation":
            with contextlib.suppress(ValueError):
                return float(attribute.findtext("value") or 0)
    return 0.0


def _read_size(root: ElementTree.Element) -> tuple[int, int] | None:
    """(height, width), or None where a tool has left it out or at 0."""
    try:
        height, width = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if min(height, width) > 0 else None


def _split_pages(tree: Tree, pages: Sequence[_Page], findings: Findings) -> dict[str | None, list[_Page]]:
    sets = _read_sets(tree)
    splits: dict[str | None, list[_Page]] = {}
    if not sets:
        for page in pages:
            splits.setdefault(split_of_path(page.file), []).append(page)
        return splits
    by_stem = {stem_of(page.file): page for page in pages}
    if len(by_stem) < len(pages):
        raise AnnotationError(f"{tree.where} has lists in {SETS} and two label files of one name; they are ambiguous")
    for split, stems in sets.items():
        unique = list(dict.fromkeys(stems))
        if repeated := sorted(stem for stem, count in Counter(stems).items() if count > 1):
            findings.add_all(Rule.REPEATED_LISTING, [f"{stem} ({split})" for stem in repeated], str)
        findings.add_all(Rule.MISSING_LABEL, [stem for stem in unique if stem not in by_stem], str)
        if chosen := [by_stem[stem] for stem in unique if stem in by_stem]:
            splits[split] = chosen
        else:
            findings.add(Rule.EMPTY_SPLIT, f"{SETS}: {split}")
    return splits


def _read_sets(tree: Tree) -> dict[str | None, list[str]]:
    """The names, without folders and suffixes, that each list of the kit holds; `default` (CVAT) is no split."""
    found: dict[str | None, list[str]] = {}
    lists = [name for name in tree.names(".txt") if f"/{name}".rpartition("/")[0].endswith(f"/{SETS.rstrip('/')}")]
    named: dict[str | None, str] = {split: name for name in lists if (split := split_of(stem_of(name)))}
    whole: dict[str, str | None] = {} if named.keys() & {"train", "val"} else {"trainval": "train"}
    if not named:
        whole["default"] = None
    named |= {whole[stem]: name for name in lists if (stem := stem_of(name)) in whole}
    for split, name in named.items():
        lines = (line.strip().strip('"') for line in tree.text(name).splitlines())
        found[split] = [_without_flag(line).rpartition("/")[2] for line in lines if line]
    return found


def _without_flag(line: str) -> str:
    """A line without the 1, 0 or -1 that says whether a class is in the image."""
    name, _, flag = line.rpartition(" ")
    return name.strip() if name and flag in ("1", "0", "-1") else line

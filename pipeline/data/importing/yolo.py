"""Reads YOLO data sets: Ultralytics' `data.yaml`, Darknet's `obj.names` and Label Studio's `classes.txt`.

A label line is `class cx cy w h`, a polygon `class x1 y1 x2 y2 ...` (also an oriented box), or, where `data.yaml` has
`kpt_shape`, a box and its key points; numbers are shares of the image's width and height, as viewers show it. Each
line counts for itself: Ultralytics reads all lines of a file as polygons if one is. As there, an image without a label
file is background, and 1% beyond the image is rounding. Class c becomes category c + 1.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from pipeline.data.importing.records import Box, Finder, LabelledImage, Split, make_splits, stem_of
from pipeline.data.importing.tree import Tree, split_of, split_of_path
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.errors import AnnotationError, ShardError

CLASS_FILES = ("obj.names", "classes.txt", "classes.names", "coco.names", "_darknet.labels")
DESCRIPTIONS = ("data", "dataset")  # usual names of the YAML file
SPLIT_KEYS = ("train", "val", "valid", "test")
MAX_YAML_BYTES = 2**20
TOLERANCE = 0.01  # beyond the image, as a share of it
IMAGES = re.compile(r"(^|/)images/(?!.*(^|/)images/)")  # the last folder of this name

Line = tuple[int, float, float, float, float]  # class, left, top, right, bottom as shares


class _Words(yaml.SafeLoader):
    """Reads values as they are written: `no`, `on` and `1.10` are names of classes, not values of other types."""


_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class YoloLayout:
    """Text files with a line per object."""

    name = "yolo"
    title = "YOLO labels"

    def find(self, tree: Tree) -> list[str]:
        """See `Layout`."""
        described = [name for name in tree.names(".yaml", ".yml") if _names_classes(tree, name)]
        return described or [name for name in tree.names(*CLASS_FILES) if name.rpartition("/")[2] in CLASS_FILES]

    def read(self, tree: Tree, exif: Exif, findings: Findings) -> list[Split]:
        """See `Layout`."""
        found = self.find(tree)
        if not found:
            raise AnnotationError(
                f"{tree.where} has neither a data.yaml with names nor one of {', '.join(CLASS_FILES)}"
            )
        ranked = sorted(found, key=lambda name: (name.count("/"), stem_of(name) not in DESCRIPTIONS, name))
        source = ranked[0]
        described = source.endswith((".yaml", ".yml"))
        equal = [n for n in ranked[1:] if stem_of(n) == stem_of(source) and n.count("/") == source.count("/")]
        if not described:  # LabelImg writes its list of classes into each folder of labels
            equal = [name for name in equal if _class_names(tree, name, {}) != _class_names(tree, source, {})]
        if equal:
            raise AnnotationError(
                f"{tree.where} holds more than one data set: {source} and {equal[0]}; give the folder of one"
                + ("" if described else ", or both the same classes")
            )
        settings = _load(tree, source) if described else {}
        names = _class_names(tree, source, settings)
        splits = dict(_listed_splits(tree, source, settings, findings)) or _split_by_folder(tree)
        labelled: dict[str | None, list[LabelledImage]] = {}
        used: set[str] = set()
        for split, images in splits.items():
            labelled[split] = []
            for image in images:
                label = _label_of(tree, image)
                lines = list(_read_label(tree, label, names, "kpt_shape" in settings, findings)) if label else []
                used |= {label} if label else set()
                try:
                    height, width = tree.image_size(image, exif)
                except ShardError as error:
                    findings.add(Rule.UNREADABLE_FILE, f"{image} {error}")
                    continue
                boxes = [Box(c + 1, x0 * width, y0 * height, x1 * width, y1 * height) for c, x0, y0, x1, y1 in lines]
                labelled[split].append(LabelledImage(image, height, width, tuple(boxes)))
        folders = {name.rpartition("/")[0] for name in used}
        alone = [name for name in tree.names(".txt") if name.rpartition("/")[0] in folders and name not in used]
        alone = [name for name in alone if name not in found and not split_of(stem_of(name))]
        findings.add_all(Rule.LABEL_WITHOUT_IMAGE, alone, str)
        return make_splits(labelled, {key + 1: name for key, name in names.items()})


def _names_classes(tree: Tree, name: str) -> bool:
    """Whether a YAML file describes a data set; a broken one does if it is called so, and `read` says what is wrong."""
    try:
        return isinstance(_load(tree, name).get("names"), list | dict)
    except AnnotationError:
        return stem_of(name) in DESCRIPTIONS


def _load(tree: Tree, name: str) -> dict[Any, Any]:
    """The settings of a YAML file; empty if it is not a mapping. Raises AnnotationError if it cannot be read."""
    try:
        settings = yaml.load(tree.text(name, MAX_YAML_BYTES), _Words)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AnnotationError(f"{name} in {tree.where} is not YAML: {error}") from None
    return settings if isinstance(settings, dict) else {}


def _class_names(tree: Tree, source: str, settings: dict[Any, Any]) -> dict[int, str]:
    """Class names by number. Raises AnnotationError."""
    if not settings:
        lines = [line.strip() for line in tree.text(source).splitlines()]
        named: Any = [line for line in lines if line]
    else:
        named = settings["names"]
    pairs = list(named.items() if isinstance(named, dict) else enumerate(named))
    names = {int(key): str(name) for key, name in pairs if _is_plain(key) and _is_plain(name) and str(key).isdecimal()}
    if not names or len(names) != len(pairs):
        raise AnnotationError(f"{source} in {tree.where}: names must be a list, or a mapping of numbers to names")
    count = settings.get("nc")
    if _is_plain(count) and str(count) != str(len(names)):
        raise AnnotationError(
            f"{source} in {tree.where}: nc is {count}, but there are {len(names)} names; correct one of them"
        )
    return dict(sorted(names.items()))


def _is_plain(value: Any) -> bool:
    """Whether this is one value: the text of nested lists of a hostile YAML file could fill the memory."""
    return isinstance(value, str | int | float)


def _listed_splits(
    tree: Tree, source: str, settings: dict[Any, Any], findings: Findings
) -> Iterator[tuple[str | None, list[str]]]:
    """The images of each split that `data.yaml`, or a text file beside `obj.names`, lists."""
    images, finder = set(tree.images), Finder(tree)
    places: dict[str, list[str]] = {}
    if settings:
        for key in SPLIT_KEYS:
            value = settings.get(key)
            if plain := [one for one in (value if isinstance(value, list) else [value]) if one and _is_plain(one)]:
                places.setdefault(split_of(key) or key, []).extend(map(str, plain))
    else:
        lists = [name for name in tree.names(".txt") if "/" not in name and split_of(stem_of(name))]
        places = {str(split_of(stem_of(name))): [name] for name in lists}
    root = settings.get("path")
    root = str(root) if root and _is_plain(root) else ""
    for split, values in places.items():
        found: list[str] = []
        for value in values:
            place = _resolve(tree, source, root, value)
            if place is None:
                findings.add(Rule.EMPTY_SPLIT, f"{source}: {split} is {value}")
            elif place.endswith(".txt"):
                found += _listed_images(tree, place, split, finder, findings)
            else:
                found += [name for name in tree.images if name.startswith(f"{place}/") or place == "."]
        repeated = sorted(name for name, count in Counter(found).items() if count > 1)
        findings.add_all(Rule.REPEATED_LISTING, [f"{name} ({split})" for name in repeated], str)
        if found:
            yield split, sorted(images & set(found))


def _resolve(tree: Tree, source: str, root: str, value: str) -> str | None:
    """The folder or list of a tree that a path in `data.yaml` means, whose beginning may be of another machine."""
    parts = [part for part in f"{root}/{value}".replace("\\", "/").split("/") if part not in ("", ".")]
    folders = {"/".join(name.split("/")[:count]) for name in tree.images for count in range(1, name.count("/") + 1)}
    here = source.split("/")[:-1]
    if not [part for part in parts if part != ".."]:
        return "/".join(here) or "."
    for start in range(len(parts)):
        for base in (here, []):
            path: list[str] = list(base)
            for part in parts[start:]:
                if part == "..":
                    path = path[:-1]
                else:
                    path.append(part)
            name = "/".join(path)
            if name in folders or (name.endswith(".txt") and name in tree.entries):
                return name
    return None


def _listed_images(tree: Tree, place: str, split: str, finder: Finder, findings: Findings) -> Iterator[str]:
    """The images of a text file with a path per line."""
    for line in tree.text(place).splitlines():
        if not line.strip():
            continue
        image = finder.named(line.strip(), place, split_of_path(line.strip()) or split)
        if image is None:
            findings.add(Rule.MISSING_FILE, f"{line.strip():.120} of {place}")
        else:
            yield image


def _split_by_folder(tree: Tree) -> dict[str | None, list[str]]:
    splits: dict[str | None, list[str]] = {}
    for image in tree.images:
        splits.setdefault(split_of_path(image), []).append(image)
    return splits


def _label_of(tree: Tree, image: str) -> str | None:
    """The label file of an image: in `labels` where the image is in `images`, else beside it."""
    beside = image.rpartition(".")[0] + ".txt"
    moved = IMAGES.sub(lambda match: f"{match[1]}labels/", beside)
    return next((name for name in (moved, beside) if name in tree.entries), None)


def _read_label(tree: Tree, label: str, names: dict[int, str], key_points: bool, findings: Findings) -> Iterator[Line]:
    """The usable lines of a label file; the others are findings. Raises AnnotationError if it cannot be read."""
    for number, text in enumerate(tree.text(label).splitlines(), start=1):
        if not text.strip():
            continue
        where = f"{label} line {number}"
        try:
            kind, *numbers = map(float, text.split())
            whole = int(kind)
        except (ValueError, OverflowError):
            findings.add(Rule.BAD_LABEL, f"{where}: {text!r:.60}")
            continue
        if key_points:
            numbers = numbers[:4]
        is_box = len(numbers) == 4
        if not (is_box or (len(numbers) >= 6 and len(numbers) % 2 == 0)):  # 6 may be a box with its confidence
            count = f"numbers: {1 + len(numbers)}; a box has 5, a polygon 7, 9, ..."
            findings.add(Rule.BAD_LABEL, f"{where}: {text!r:.60} ({count})")
        elif not all(map(math.isfinite, numbers)):
            findings.add(Rule.BAD_LABEL, f"{where}: {text!r:.60}")
        elif whole != kind or whole not in names:
            findings.add(Rule.UNKNOWN_CLASS, f"{where}: class {kind:g} of {len(names)}")
        elif min(numbers) < -TOLERANCE or max(numbers) > 1 + TOLERANCE:
            worst = min(numbers) if min(numbers) < -TOLERANCE else max(numbers)
            findings.add(Rule.NOT_NORMALIZED, f"{where}: {worst:g}")
        elif is_box:
            cx, cy, w, h = numbers
            yield whole, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        else:
            xs, ys = numbers[::2], numbers[1::2]
            yield whole, min(xs), min(ys), max(xs), max(ys)

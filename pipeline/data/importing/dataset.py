"""Reads and checks a whole data set: from its files to the samples of each split.

`jobs.lint` and `jobs.shard build` share `read_dataset`, so they cannot disagree. All splits are checked together: one
decision about EXIF, one numbering of classes, one list of findings. Splits that are missing are taken from the training
images (`splitting`). A data set that cannot be read at all is an AnnotationError; everything else is a finding of
`sharding.rules`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from pipeline.data.images import MAX_BYTES
from pipeline.data.importing.classes import ClassChoice, map_classes
from pipeline.data.importing.layouts import recognise
from pipeline.data.importing.records import Split
from pipeline.data.importing.splitting import Candidate, deal_out
from pipeline.data.importing.tree import Tree, open_tree
from pipeline.data.index import Category
from pipeline.data.records import usable_annotations
from pipeline.data.sharding.annotations import CocoImage, CocoSource, Collector, add_unused
from pipeline.data.sharding.duplicates import find_duplicates
from pipeline.data.sharding.image_files import ImageFile, read_image_file
from pipeline.data.sharding.lint import (
    CheckedImages,
    RotatedSample,
    check_and_fingerprint,
    check_headers,
    check_samples,
)
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.data.sharding.sources import too_large
from pipeline.errors import AnnotationError, ConfigError, ShardError
from pipeline.progress import Progress

TRAIN, VAL, TEST = SPLITS = ("train", "val", "test")
OPTIONAL = (VAL, TEST)  # may be missing, or have no images
DEFAULT_SHARE = Fraction(1, 10)  # of a missing split, if there is no validation split

Sample = tuple[CocoImage, ImageFile]


@dataclass(frozen=True)
class Options:
    """How a data set is read; the flags of `jobs.lint` and `jobs.shard build`."""

    format: str | None = None  # one of `layouts.FORMATS`; None to recognise it
    split: float | None = None  # share of each missing one of val and test; None for the default
    classes: ClassChoice = field(default_factory=ClassChoice)
    drop_unused: bool = False
    exif: Exif = "auto"
    limit: int | None = None  # images of each split, the first by id


@dataclass(frozen=True)
class DatasetSplit:
    """The samples of one split; every split has the same categories."""

    name: str
    source: CocoSource
    samples: tuple[Sample, ...]
    used: frozenset[int]  # ids of categories with a box to train on


@dataclass(frozen=True)
class Dataset:
    """A data set, its findings, and what was recognised and made."""

    layout: str
    splits: tuple[DatasetSplit, ...]
    findings: Findings
    rotated: tuple[RotatedSample, ...]  # of images that EXIF rotates
    made: tuple[str, ...]  # names of splits that were taken from the training images

    def describe(self) -> str:
        """One line: layout, splits, classes."""
        counts = [
            f"{split.name} {len(split.samples):,}" + (" (made)" if split.name in self.made else "")
            for split in self.splits
        ]
        classes = len(self.splits[0].source.categories) if self.splits else 0
        return f"{self.layout}: {', '.join(counts) or 'no'} images, {classes:,} classes"


def read_dataset(path: str, options: Options, *, decode: bool = False, workers: int = 1) -> Dataset:
    """Read a folder or archive, and check annotations and images.

    Args:
        path: folder, zip or tar.
        options: see `Options`.
        decode: decode all images, and look for duplicates in different splits.
        workers: parallel tasks; more than 1 run on Ray.

    Raises:
        AnnotationError: it cannot be read at all.
        ConfigError: the options do not fit it.
        ResourceError: more workers than CPUs.
    """
    share = _parse_share(options.split)
    if options.limit is not None and options.limit < 1:
        raise AnnotationError(f"--limit must be at least 1, not {options.limit}")
    tree = open_tree(path)
    layout, files = recognise(tree, options.format)
    findings = Findings()
    splits = layout.read(tree, options.exif, findings)
    sources = _collect(splits, options, findings)
    categories = _unite(sources, splits, options.drop_unused, findings)
    if sources and not any(source.used for source in sources):
        findings.add(Rule.NO_BOXES, f"{path} ({layout.title}, {files[0]})")
    else:
        bare = [split for split, source in zip(splits, sources, strict=True) if source.images and not source.used]
        findings.add_all(Rule.EMPTY_LABELS, bare, lambda split: split.origin or split.name or path)
    samples = [
        _locate(source.images, tree, findings, split.origin) for split, source in zip(splits, sources, strict=True)
    ]
    _add_unlisted(tree, sources, findings)
    check = check_and_fingerprint if decode else check_headers
    checked = check_samples([sample for part in samples for sample in part], findings, check, workers, options.exif)
    parts, used, first = [], {}, 0
    for split, source, part in zip(splits, sources, samples, strict=True):
        if source.images or split.name not in OPTIONAL:
            parts.append((split.name or TRAIN, range(first, first + len(part))))
            used[split.name or TRAIN] = source.used
        first += len(part)
    shares = _missing_shares([name for name, _ in parts], share)
    named = _make_missing(parts, checked, shares, used)
    _add_never_trained(categories, {name: used[name] for name in named}, findings)
    if decode:
        prints = {
            name: [(checked.samples[k][0].file_name, checked.prints[k]) for k in positions if k in checked.prints]
            for name, positions in named.items()
        }
        find_duplicates(prints, findings)
    kept = [
        _finish(name, categories, [checked.samples[k] for k in positions], used[name])
        for name, positions in named.items()
    ]
    if not kept and not findings.refused():
        findings.add(Rule.NO_IMAGES, f"{path} ({layout.title}, {files[0]})")
    return Dataset(
        f"{layout.title} ({files[0]}{', ...' if len(files) > 1 else ''})",
        tuple(kept),
        findings,
        tuple((*checked.samples[k], orientation) for k, orientation in checked.orientations.items()),
        tuple(name for name in shares if name != TRAIN and name in named),
    )


def _collect(splits: Sequence[Split], options: Options, findings: Findings) -> list[CocoSource]:
    """Check the entries of each split as those of a COCO file."""
    chosen = None
    if options.classes:
        known: dict[int, str] = {}
        for split in splits:
            known |= split.categories()
        chosen = map_classes(known, options.classes)
    sources = []
    for split in splits:
        collector = Collector(named=True)
        for kind, entry in chosen.apply(split.entries()) if chosen else split.entries():
            collector.add(kind, entry)
        sources.append(collector.finish("", options.limit, optional=split.name in OPTIONAL))
        findings.merge(collector.findings, split.origin)
    return sources


def _unite(
    sources: Sequence[CocoSource], splits: Sequence[Split], drop_unused: bool, findings: Findings
) -> tuple[Category, ...]:
    """The categories of all splits. Raises AnnotationError if two splits name them differently."""
    names: dict[int, tuple[str, str]] = {}  # by id: the name, and where it is from
    ids: dict[str, tuple[list[int], str]] = {}  # by name
    for source, split in zip(sources, splits, strict=True):
        origin = split.origin or split.name or "the data set"
        own: dict[str, list[int]] = {}
        for category in source.categories:
            own.setdefault(category.name, []).append(category.id)
            before, where = names.setdefault(category.id, (category.name, origin))
            if before != category.name:
                raise AnnotationError(
                    f"category {category.id} is {before!r} in {where} and {category.name!r} in {origin}; export all "
                    "splits with the same classes"
                )
        for name, numbers in own.items():
            known, where = ids.setdefault(name, (numbers, origin))
            if known != numbers:
                raise AnnotationError(
                    f"class {name!r} is category {known[0]} in {where} and {numbers[0]} in {origin}; export all "
                    "splits with the same classes"
                )
    categories = [Category(key, names[key][0]) for key in sorted(names)]
    used = {key for source in sources for key in source.used}
    if drop_unused:
        dropped = [category for category in categories if category.id not in used]
        findings.add_all(Rule.DROPPED_CATEGORY, dropped, lambda category: f"{category.id} ({category.name})")
        return tuple(category for category in categories if category.id in used)
    add_unused(categories, used, findings)
    return tuple(categories)


def _add_never_trained(categories: Sequence[Category], used: dict[str, frozenset[int]], findings: Findings) -> None:
    """Add a finding for each category that is evaluated and has no box in the training images."""
    if TRAIN in used:
        missing = frozenset().union(*used.values()) - used[TRAIN]
        alone = [category for category in categories if category.id in missing]
        findings.add_all(Rule.NEVER_TRAINED, alone, lambda category: f"{category.id} ({category.name})")


def _locate(images: Sequence[CocoImage], tree: Tree, findings: Findings, origin: str) -> list[Sample]:
    """The images whose files can be used; the others are findings."""
    found = []
    for image in images:
        entry = tree.entries.get(image.file_name)
        if entry is None:
            findings.add(Rule.MISSING_FILE, f"{image.file_name} of {origin}" if origin else image.file_name)
        elif entry.file is None:
            findings.add(Rule.UNREADABLE_FILE, f"{image.file_name} {entry.fault}")
        elif entry.file.length > MAX_BYTES:
            findings.add(Rule.UNREADABLE_FILE, f"{image.file_name} {too_large(entry.file.length)}")
        else:
            found.append((image, entry.file))
    return found


def _add_unlisted(tree: Tree, sources: Sequence[CocoSource], findings: Findings) -> None:
    refused = {name for source in sources for name in source.refused_files}
    listed = {image.file_name for source in sources for image in source.images}
    unlisted = [name for name in tree.images if name not in listed and name.rpartition("/")[2] not in refused]
    findings.add_all(Rule.UNLISTED_FILE, unlisted, str)


def _parse_share(split: float | None) -> Fraction | None:
    if split is None:
        return None
    if not 0 <= split < 0.5:
        raise ConfigError(f"--split is the share of each missing split, from 0 to below 0.5, not {split}")
    return Fraction(str(split))


def _missing_shares(present: Sequence[str], share: Fraction | None) -> dict[str, Fraction]:
    """The share of the training images that stays, and those of the splits to make; empty if there is none."""
    if share is None:
        share = Fraction(0) if VAL in present else DEFAULT_SHARE
    missing = [name for name in (VAL, TEST) if name not in present]
    if TRAIN not in present or not missing or not share:
        return {}
    return {TRAIN: 1 - share * len(missing), **dict.fromkeys(missing, share)}


def _make_missing(
    parts: Sequence[tuple[str, range]],
    checked: CheckedImages,
    shares: dict[str, Fraction],
    used: dict[str, frozenset[int]],
) -> dict[str, list[int]]:
    """The positions of the samples of each split, in the order of SPLITS; splits without samples are left out.

    The classes of splits that get or give images are changed in `used`.
    """
    named = {name: list(positions) for name, positions in parts}
    if shares:
        pool = named[TRAIN]
        candidates = []
        with Progress(len(pool), "hashing images", "image") as bar:
            for position in pool:
                image, file = checked.samples[position]
                candidates.append(_candidate(image, file))
                bar.advance()
        named |= {name: [] for name in shares}
        used |= dict.fromkeys(shares, frozenset())
        for position, candidate, name in zip(pool, candidates, deal_out(candidates, shares), strict=True):
            named[name].append(position)
            used[name] |= candidate.classes
    return {name: named[name] for name in SPLITS if named.get(name)}


def _candidate(image: CocoImage, file: ImageFile) -> Candidate:
    annotations = usable_annotations(image.annotations, (image.height, image.width))[1]
    try:
        digest = hashlib.sha256(read_image_file(file)).hexdigest()
    except ShardError:  # a finding already, or a fault when the shard is written
        digest = hashlib.sha256(image.file_name.encode()).hexdigest()
    return Candidate(digest, frozenset(annotation["category_id"] for annotation in annotations))


def _finish(
    name: str, categories: tuple[Category, ...], samples: Sequence[Sample], used: frozenset[int]
) -> DatasetSplit:
    """The split with a digest of its annotations; two splits of the same images have the same one."""
    digest = hashlib.sha256(json.dumps([[category.id, category.name] for category in categories]).encode())
    for image, _ in samples:
        digest.update(json.dumps([image.file_name, len(image.record)]).encode())
        digest.update(image.record)
    source = CocoSource(digest.hexdigest(), categories, tuple(image for image, _ in samples))
    return DatasetSplit(name, source, tuple(samples), used)

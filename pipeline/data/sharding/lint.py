"""Everything that can be said about a COCO-format data set before it is built; `python -m jobs.lint` is its command.

`shards.build_shards` starts with the same `examine`, and refuses by the same rules. The one difference: linting decodes
every picture, a build reads their headers first and decodes each when it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.images import Size, check_decodes, deep_range, has_alpha, open_image, read_orientation
from pipeline.data.sharding import parallel
from pipeline.data.sharding.annotations import CocoImage, CocoSource, inspect_coco
from pipeline.data.sharding.orientation import Exif, Turned, decide
from pipeline.data.sharding.pictures import Picture, read_picture
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.data.sharding.sources import find_pictures
from pipeline.errors import AnnotationError, ShardError
from pipeline.progress import Progress

HEAD_BYTES = 4096  # enough for the header of nine in ten of COCO; the others are read whole
CHUNK = 256  # pictures looked at in one piece of work

Look = tuple[str, Size, Picture]  # file name, size of the image entry, where it is


@dataclass(frozen=True)
class Examined:
    """A data set and what was found."""

    source: CocoSource
    samples: tuple[tuple[CocoImage, Picture], ...]  # images by ascending id, as far as their pictures are there
    findings: Findings
    orientations: dict[int, int]  # by image id, of pictures that EXIF turns, applied or not


@dataclass
class Seen:
    """What was found in a piece of work."""

    findings: Findings = field(default_factory=Findings)
    turned: list[tuple[int, Turned]] = field(default_factory=list)  # with the position in the piece


def examine(
    annotations: Path,
    images: str | None,
    *,
    limit: int | None = None,
    decode: bool = False,
    workers: int = 1,
    exif: Exif = "auto",
) -> Examined:
    """Read the annotations and look at the pictures.

    Args:
        annotations: COCO instances JSON.
        images: folder, zip, tar or folder of tars; None to leave the pictures out.
        limit: only the first images by id.
        decode: decode whole pictures, not only their headers.
        workers: pieces of work at a time; more than 1 run as Ray tasks.
        exif: whether boxes and sizes are those of displayed (apply) or stored pictures (ignore); see `orientation`.

    Raises:
        AnnotationError: what cannot be read at all.
        ResourceError: more workers than CPUs.
    """
    if limit is not None and limit < 1:
        raise AnnotationError(f"--limit must be at least 1, not {limit}")
    source, findings = inspect_coco(annotations, limit)
    if images is None:
        return Examined(source, (), findings, {})
    complete = decode and limit is None  # else the names of the others are not known
    names = [image.file_name for image in source.images]
    try:
        found = find_pictures(images, names, findings, source.refused_files if complete else None)
    except AnnotationError as error:  # what was found in the annotations is worth showing all the same
        findings.add(Rule.BAD_PLACE, str(error))
        return Examined(source, (), findings, {})
    samples = [(image, found[image.file_name]) for image in source.images if image.file_name in found]
    looks = [(image.file_name, (image.height, image.width), picture) for image, picture in samples]
    chunks = [looks[start : start + CHUNK] for start in range(0, len(looks), CHUNK)]
    pieces: dict[int, Seen] = {}
    with Progress(len(samples), "decoding pictures" if decode else "checking pictures", "image") as bar:
        for number, piece in parallel.run(check_pictures if decode else check_headers, chunks, workers):
            pieces[number] = piece
            bar.advance(len(chunks[number]))
    turned: dict[int, Turned] = {}  # by position in `samples`
    for number in range(len(chunks)):
        findings.merge(pieces[number].findings)
        turned |= {number * CHUNK + position: one for position, one in pieces[number].turned}
    orientations = {samples[position][0].id: one.orientation for position, one in turned.items()}
    if decide(list(turned.values()), exif, findings):
        for position, one in turned.items():
            image, picture = samples[position]
            samples[position] = (image.turned(one.orientation), picture)
    return Examined(source, tuple(samples), findings, orientations)


def check_headers(looks: Sequence[Look]) -> Seen:
    """Compare the headers of pictures with their image entries."""
    seen = Seen()
    for position, (name, size, picture) in enumerate(looks):
        try:
            try:
                _compare(position, name, size, read_picture(picture, HEAD_BYTES), seen)
            except ShardError:  # long metadata can push the header further back
                _compare(position, name, size, read_picture(picture), seen)
        except ShardError as error:
            seen.findings.add(Rule.UNREADABLE_PICTURE, f"{name} {error}")
    return seen


def check_pictures(looks: Sequence[Look]) -> Seen:
    """As `check_headers`, and prove that all of each picture decodes."""
    seen = Seen()
    for position, (name, size, picture) in enumerate(looks):
        try:
            data = read_picture(picture)
            check_decodes(data, _compare(position, name, size, data, seen))
            if (found := deep_range(data)) is not None:
                low, high, own = found
                seen.findings.add(Rule.DARK_PICTURE if own else Rule.DEEP_PICTURE, f"{name} ({low:g} to {high:g})")
        except ShardError as error:
            seen.findings.add(Rule.UNREADABLE_PICTURE, f"{name} {error}")
    return seen


def _compare(position: int, name: str, size: Size, data: bytes, seen: Seen) -> Size:
    """The (height, width) as stored. Sizes of pictures that EXIF turns are compared when all are known."""
    image = open_image(data)
    stored = (image.height, image.width)
    if has_alpha(image):
        seen.findings.add(Rule.ALPHA, name)
    if (orientation := read_orientation(image)) != 1:
        seen.turned.append((position, Turned(name, orientation, stored, size)))
    elif stored != size:
        seen.findings.add(
            Rule.WRONG_SIZE, f"{name} is {image.width} x {image.height}, its entry says {size[1]} x {size[0]}"
        )
    return stored

"""Everything that can be said about a COCO-format data set before it is built; `python -m jobs.lint` is its command.

`shards.build_shards` starts with the same `examine`, and refuses by the same rules. The one difference: linting decodes
every picture, a build reads their headers first and decodes each when it is written.
"""

import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipeline.data import pool
from pipeline.data.annotations import CocoImage, CocoSource, inspect_coco
from pipeline.data.images import check_decodes, open_image
from pipeline.data.pictures import Picture, read_picture
from pipeline.data.progress import Progress
from pipeline.data.rules import Findings, Rule
from pipeline.data.sources import find_pictures
from pipeline.errors import AnnotationError, ShardError

HEAD_BYTES = 4096  # enough for the header of nine in ten of COCO; the others are read whole
ORIENTATION = 0x0112  # EXIF tag; 1 means as stored
CHUNK = 256  # pictures looked at in one piece of work

Look = tuple[str, tuple[int, int], Picture]  # file name, (height, width) of the image entry, where it is


@dataclass(frozen=True)
class Examined:
    """A data set and what was found."""

    source: CocoSource
    samples: tuple[tuple[CocoImage, Picture], ...]  # images by ascending id, as far as their pictures are there
    findings: Findings


def examine(
    annotations: Path, images: str | None, *, limit: int | None = None, decode: bool = False, workers: int = 1
) -> Examined:
    """Read the annotations and look at the pictures.

    Args:
        annotations: COCO instances JSON.
        images: folder, zip, tar or folder of tars; None to leave the pictures out.
        limit: only the first images by id.
        decode: decode whole pictures, not only their headers.
        workers: pieces of work at a time; more than 1 run as Ray tasks.

    Raises:
        AnnotationError: what cannot be read at all.
        ResourceError: more workers than CPUs.
    """
    if limit is not None and limit < 1:
        raise AnnotationError(f"--limit must be at least 1, not {limit}")
    source, findings = inspect_coco(annotations, limit)
    if images is None:
        return Examined(source, (), findings)
    found = find_pictures(images, [image.file_name for image in source.images], findings)
    samples = tuple((image, found[image.file_name]) for image in source.images if image.file_name in found)
    looks = [(image.file_name, (image.height, image.width), picture) for image, picture in samples]
    chunks = [looks[start : start + CHUNK] for start in range(0, len(looks), CHUNK)]
    pieces: dict[int, Findings] = {}
    with Progress(len(samples), "decoding pictures" if decode else "checking pictures", "image") as bar:
        for number, piece in pool.run(check_pictures if decode else check_headers, chunks, workers):
            pieces[number] = piece
            bar.advance(len(chunks[number]))
    for number in range(len(chunks)):
        findings.merge(pieces[number])
    return Examined(source, samples, findings)


def check_headers(looks: Sequence[Look]) -> Findings:
    """Compare the headers of pictures with their image entries."""
    findings = Findings()
    for name, size, picture in looks:
        try:
            try:
                _compare(name, size, read_picture(picture, HEAD_BYTES), findings)
            except ShardError:  # long metadata can push the header further back
                _compare(name, size, read_picture(picture), findings)
        except ShardError as error:
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} {error}")
    return findings


def check_pictures(looks: Sequence[Look]) -> Findings:
    """As `check_headers`, and prove that all of each picture decodes."""
    findings = Findings()
    for name, size, picture in looks:
        try:
            data = read_picture(picture)
            if _compare(name, size, data, findings):
                check_decodes(data, size)
        except ShardError as error:
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} {error}")
    return findings


def _compare(name: str, size: tuple[int, int], data: bytes, findings: Findings) -> bool:
    image = open_image(data)
    width, height = image.size
    if _is_rotated(image):
        findings.add(Rule.ROTATED_PICTURE, name)
    if (height, width) == size:
        return True
    findings.add(Rule.WRONG_SIZE, f"{name} is {width} x {height}, its entry says {size[1]} x {size[0]}")
    return False


def _is_rotated(image: Image.Image) -> bool:
    """Whether viewers turn or mirror the picture, so that boxes drawn in one lie elsewhere in the stored pixels."""
    if "exif" not in image.info:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF says nothing
            return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return False

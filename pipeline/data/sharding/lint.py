"""Examines a COCO-format data set before it is built (`python -m jobs.lint`).

`shards.build_shards` starts with the same `examine` and refuses by the same rules. There is one difference: linting
decodes every image, while a build first reads their headers and decodes each image when it writes it. A data set
that cannot be read at all is an AnnotationError.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.data.images import Size, check_decodes, deep_range, has_alpha, open_image, read_orientation
from pipeline.data.sharding import parallel
from pipeline.data.sharding.annotations import CocoImage, CocoSource, inspect_coco
from pipeline.data.sharding.converted import other_format, to_png
from pipeline.data.sharding.duplicates import Fingerprint, fingerprint
from pipeline.data.sharding.image_files import ImageFile, read_image_file
from pipeline.data.sharding.orientation import Exif, RotatedImage, decide
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.data.sharding.sources import find_image_files
from pipeline.errors import AnnotationError, ShardError
from pipeline.progress import Progress

HEAD_BYTES = 4096  # enough for nine of ten headers in COCO; the other files are read whole
IMAGES_PER_TASK = 256

RotatedSample = tuple[CocoImage, ImageFile, int]  # with its EXIF orientation, applied or not
ExpectedFile = tuple[str, Size, ImageFile]  # file name, size in the image entry, position of the bytes


@dataclass(frozen=True)
class Examination:
    """A data set and its findings."""

    source: CocoSource
    samples: tuple[tuple[CocoImage, ImageFile], ...]  # images by ascending id whose files exist
    findings: Findings
    orientations: dict[int, int]  # by image id, of images that EXIF rotates, applied or not

    @property
    def rotated(self) -> list[RotatedSample]:
        """The samples whose images EXIF rotates."""
        samples = [sample for sample in self.samples if sample[0].id in self.orientations]
        return [(image, file, self.orientations[image.id]) for image, file in samples]


@dataclass
class ChunkReport:
    """The findings of one task."""

    findings: Findings = field(default_factory=Findings)
    turned: list[tuple[int, RotatedImage]] = field(default_factory=list)  # with the position in the task
    converted: list[tuple[int, int]] = field(default_factory=list)  # position in the task, bytes as PNG
    prints: list[tuple[int, Fingerprint]] = field(default_factory=list)  # with the position in the task


@dataclass(frozen=True)
class CheckedImages:
    """The samples of `check_samples`, with what to apply when they are read."""

    samples: list[tuple[CocoImage, ImageFile]]
    orientations: dict[int, int]  # by position, of images that EXIF rotates, applied or not
    prints: dict[int, Fingerprint]  # by position; of images that decode, if asked for


def examine(
    annotations: Path,
    images: str | None,
    *,
    limit: int | None = None,
    decode: bool = False,
    workers: int = 1,
    exif: Exif = "auto",
) -> Examination:
    """Read the annotations and check the images.

    Args:
        annotations: COCO instances JSON.
        images: folder, zip, tar or folder of tars; None to skip the images.
        limit: only the first images by id.
        decode: decode whole images, not only their headers.
        workers: parallel tasks; more than 1 run on Ray.
        exif: whether boxes and sizes are those of displayed (apply) or stored images (ignore); see `orientation`.

    Raises:
        AnnotationError: the annotations cannot be read at all.
        ResourceError: more workers than CPUs.
    """
    if limit is not None and limit < 1:
        raise AnnotationError(f"--limit must be at least 1, not {limit}")
    source, findings = inspect_coco(annotations, limit)
    if images is None:
        return Examination(source, (), findings, {})
    complete = decode and limit is None  # else the names of the other images are not known
    names = [image.file_name for image in source.images]
    try:
        found = find_image_files(images, names, findings, source.refused_files if complete else None)
    except AnnotationError as error:  # the findings of the annotations are still worth showing
        findings.add(Rule.BAD_PLACE, str(error))
        return Examination(source, (), findings, {})
    samples = [(image, found[image.file_name]) for image in source.images if image.file_name in found]
    checked = check_samples(samples, findings, check_image_files if decode else check_headers, workers, exif)
    orientations = {samples[position][0].id: one for position, one in checked.orientations.items()}
    return Examination(source, tuple(checked.samples), findings, orientations)


def check_samples(
    samples: Sequence[tuple[CocoImage, ImageFile]],
    findings: Findings,
    check: Callable[[Sequence[ExpectedFile]], "ChunkReport"],
    workers: int = 1,
    exif: Exif = "auto",
) -> CheckedImages:
    """Check images with `check_headers`, `check_image_files` or `check_and_fingerprint`; see `examine`."""
    samples = list(samples)
    expected = [(image.file_name, (image.height, image.width), file) for image, file in samples]
    chunks = [expected[start : start + IMAGES_PER_TASK] for start in range(0, len(expected), IMAGES_PER_TASK)]
    pieces: dict[int, ChunkReport] = {}
    what = "checking images" if check is check_headers else "decoding images"
    with Progress(len(samples), what, "image") as bar:
        for number, piece in parallel.run(check, chunks, workers):
            pieces[number] = piece
            bar.advance(len(chunks[number]))
    turned: dict[int, RotatedImage] = {}  # by position in `samples`
    prints: dict[int, Fingerprint] = {}
    for number in range(len(chunks)):
        piece, first = pieces[number], number * IMAGES_PER_TASK
        findings.merge(piece.findings)
        turned |= {first + position: one for position, one in piece.turned}
        prints |= {first + position: one for position, one in piece.prints}
        for position, length in piece.converted:
            image, file = samples[first + position]
            samples[first + position] = (image, replace(file, as_png=length))
    if decide(list(turned.values()), exif, findings):
        for position, one in turned.items():
            image, file = samples[position]
            samples[position] = (image.with_orientation(one.orientation), file)
    return CheckedImages(samples, {position: one.orientation for position, one in turned.items()}, prints)


def check_headers(expected: Sequence[ExpectedFile]) -> ChunkReport:
    """Compare the headers of image files with their image entries."""
    seen = ChunkReport()
    for position, (name, size, file) in enumerate(expected):
        try:
            data = read_image_file(file, HEAD_BYTES)
            if other_format(data):
                _compare(position, name, size, _convert(position, name, read_image_file(file), seen), seen)
                continue
            try:
                _compare(position, name, size, data, seen)
            except ShardError:  # long metadata can push the header further back
                _compare(position, name, size, read_image_file(file), seen)
        except ShardError as error:
            seen.findings.add(Rule.UNREADABLE_FILE, f"{name} {error}")
    return seen


def check_image_files(expected: Sequence[ExpectedFile]) -> ChunkReport:
    """As `check_headers`, and decode each whole image."""
    return _check_whole(expected, prints=False)


def check_and_fingerprint(expected: Sequence[ExpectedFile]) -> ChunkReport:
    """As `check_image_files`, and take fingerprints."""
    return _check_whole(expected, prints=True)


def _check_whole(expected: Sequence[ExpectedFile], prints: bool) -> ChunkReport:
    seen = ChunkReport()
    for position, (name, size, file) in enumerate(expected):
        try:
            original = data = read_image_file(file)
            if other_format(data):
                data = _convert(position, name, data, seen)
            image = check_decodes(data, _compare(position, name, size, data, seen))
            if prints:
                seen.prints.append((position, fingerprint(original, data, image)))
            if (found := deep_range(data)) is not None:
                low, high, own = found
                seen.findings.add(Rule.DARK_IMAGE if own else Rule.DEEP_IMAGE, f"{name} ({low:g} to {high:g})")
        except ShardError as error:
            seen.findings.add(Rule.UNREADABLE_FILE, f"{name} {error}")
    return seen


def _convert(position: int, name: str, data: bytes, seen: ChunkReport) -> bytes:
    """The image as PNG, with a finding. Raises ShardError."""
    png = to_png(data)
    seen.findings.add(Rule.CONVERTED, f"{name} ({other_format(data)})")
    seen.converted.append((position, len(png)))
    return png


def _compare(position: int, name: str, size: Size, data: bytes, seen: ChunkReport) -> Size:
    """Check the header and return (height, width) as stored. Images that EXIF rotates are compared in `decide`."""
    image = open_image(data)
    stored = (image.height, image.width)
    if has_alpha(image):
        seen.findings.add(Rule.ALPHA, name)
    if (orientation := read_orientation(image)) != 1:
        seen.turned.append((position, RotatedImage(name, orientation, stored, size)))
    elif stored != size:
        seen.findings.add(
            Rule.WRONG_SIZE, f"{name} is {image.width} x {image.height}, its entry says {size[1]} x {size[0]}"
        )
    return stored

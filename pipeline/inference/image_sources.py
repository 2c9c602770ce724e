"""The images that a prediction is given: files, URLs, folders, globs, archives, shards, and lists of paths and URLs.

Listing opens no image, so a damaged one is found when it is read. Archives are read as in `importing.tree`: nothing is
extracted, and names that leave the archive are refused. A source that is missing or holds no image is an InputError.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.images import MAGIC, MAX_BYTES
from pipeline.data.importing.tree import IMAGE_SUFFIXES, open_tree
from pipeline.data.index import INDEX, SAMPLES, check_shards, load_index
from pipeline.data.sharding.converted import other_format, to_png
from pipeline.data.sharding.image_files import ImageFile, read_image_file
from pipeline.data.sharding.sources import to_printable, too_large
from pipeline.errors import InputError, ShardError
from pipeline.files.credentials import refuse_login
from pipeline.files.shard_files import is_shard_url
from pipeline.files.storage import error_reason, is_url, join, read_bytes, read_range

LIST_SUFFIXES, ARCHIVE_SUFFIXES = (".txt", ".lst"), (".zip", ".tar", ".tgz", ".tar.gz")
LARGEST_ID = 2**63


@dataclass(frozen=True)
class ImageSource:
    """One image: what it is called, and where its bytes are."""

    name: str  # path, URL, or place in an archive or in shards; can be printed
    file: ImageFile | None = None  # bytes on a disk
    url: str = ""  # bytes in a store
    offset: int = 0  # in the store's file
    length: int = 0  # in the store's file; 0: all of it
    id: int | None = None  # of the annotation file; of shards only
    fault: str = ""  # why there are no bytes

    def read(self) -> bytes:
        """The bytes of a JPEG or PNG file; WebP, BMP and TIFF become PNG. Raises InputError without the name."""
        if self.url:
            try:
                data = read_range(self.url, self.offset, self.length or MAX_BYTES + 1)
            except OSError as error:
                raise InputError(f"cannot be read: {error_reason(error)}") from None
            if len(data) > MAX_BYTES:
                raise InputError(f"has more than {MAX_BYTES:,} bytes; scale it down")
        elif self.file is None:
            raise InputError(self.fault)
        elif self.file.length > MAX_BYTES:
            raise ShardError(too_large(self.file.length))
        else:
            data = read_image_file(self.file)
        return to_png(data) if other_format(data) else data


def list_images(sources: Sequence[str]) -> list[ImageSource]:
    """The images of all sources in their order, those of a source by name; one that is named twice comes once.

    Args:
        sources: of each form that the module names. An existing path is never a glob.

    Raises:
        InputError: a source is missing, holds no image, or is not safe to read.
    """
    found: dict[ImageSource, None] = {}  # by all of it: two names that cannot be printed may look the same
    for source in sources:
        images = list(_images_of(source))
        if not images:
            raise InputError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES[:7])})")
        found.update(dict.fromkeys(images))
    return list(found)


def number_images(images: Sequence[ImageSource]) -> list[int]:
    """The `image_id` of each image.

    That of its annotation file, if all images have one and all differ: shards keep it, and COCO's file names are the
    number (`000000000139.jpg`). Otherwise 1, 2, 3 and so on.
    """
    numbers = [_number_of(image) for image in images]
    known = [number for number in numbers if number is not None]
    return known if len(set(known)) == len(images) else list(range(1, len(images) + 1))


def _number_of(image: ImageSource) -> int | None:
    stem = image.name.rpartition("/")[2].rpartition(".")[0]
    if image.id is not None or not (stem.isascii() and stem.isdecimal()):
        return image.id
    return number if len(stem) < 20 and (number := int(stem)) < LARGEST_ID else None


def _images_of(source: str) -> Iterator[ImageSource]:
    if not os.path.lexists(source) and is_shard_url(source):
        refuse_login(source, "the address of an image")
        yield from _from_url(source)
        return
    path = Path(source)
    try:
        if path.is_dir():
            shards = (path / INDEX).is_file() and (path / SAMPLES).is_file()
            yield from _from_shards(source) if shards else _from_tree(source, is_folder=True)
        elif path.is_file():
            yield from _from_file(path)
        elif matches := sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else []:
            yield from (_one_file(Path(match)) for match in matches if match.lower().endswith(IMAGE_SUFFIXES))
        elif glob.has_magic(source):
            raise InputError(f"no file matches {source}")
        else:
            path.stat()
            raise InputError(f"{source} is not a plain file")
    except OSError as error:
        raise InputError(f"cannot read image {source}: {error.strerror}") from None
    except ValueError as error:  # such as a null byte
        raise InputError(f"cannot read image {source!r}: {error}") from None


def _from_file(path: Path) -> Iterator[ImageSource]:
    with path.open("rb") as file:
        head = file.read(12)
    suffix = path.suffix.lower()
    if head.startswith(tuple(MAGIC)) or other_format(head) or suffix in IMAGE_SUFFIXES:
        yield _one_file(path)
    elif suffix in LIST_SUFFIXES:
        yield from _from_list(path.read_bytes(), str(path))
    else:
        yield from _from_tree(str(path), is_folder=False)


def _one_file(path: Path, name: str = "") -> ImageSource:
    name = to_printable(name or str(path))
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        return ImageSource(name, fault=f"cannot be read: {getattr(error, 'strerror', None) or error}")
    if not path.is_file():
        return ImageSource(name, fault="is not a plain file")
    return ImageSource(name, ImageFile(os.path.abspath(path), status.st_size, status.st_mtime_ns))


def _from_tree(source: str, is_folder: bool) -> Iterator[ImageSource]:
    tree = open_tree(source)
    for inner in tree.images:
        entry = tree.entries[inner]
        if is_folder and entry.file is not None:  # the tree leaves out folders that only wrap others
            inner = os.path.relpath(entry.file.path, os.path.abspath(source)).replace(os.sep, "/")
        name = inner if is_folder and source == "." else join(source, inner)
        yield ImageSource(to_printable(name), entry.file, fault=entry.fault)


def _from_shards(folder: str) -> Iterator[ImageSource]:
    index = load_index(folder)
    check_shards(index)
    samples = index.samples
    for row in range(len(samples)):
        shard = index.shards[int(samples.shard[row])]
        number, offset, length = (int(column[row]) for column in (samples.image_id, samples.offset, samples.length))
        name, path = join(index.folder, f"{number:012d}.{'png' if samples.png[row] else 'jpg'}"), shard.name
        where = join(index.folder, path)
        if is_url(where):
            yield ImageSource(name, url=where, offset=offset, length=length, id=number)
        else:
            stamp = int(shard.sha256[:15], 16)
            yield ImageSource(name, ImageFile(os.path.abspath(where), length, stamp, offset), id=number)


def _from_url(url: str) -> Iterator[ImageSource]:
    address = url.partition("?")[0].lower()
    if address.endswith(IMAGE_SUFFIXES):
        yield ImageSource(url, url=url)
    elif address.endswith(LIST_SUFFIXES):
        try:
            text = read_bytes(url)
        except OSError as error:
            raise InputError(f"cannot read {url}: {error_reason(error)}") from None
        yield from _from_list(text, "")
    elif address.endswith(ARCHIVE_SUFFIXES):
        raise InputError(f"{url}: an archive is read from a disk; download it, or give shards, images or a list")
    else:
        yield from _from_shards(url)


def _from_list(text: bytes, listed_in: str) -> Iterator[ImageSource]:
    """One path or URL a line; blank lines and those after `#` are left out. What cannot be read is found later."""
    try:
        lines = [line.strip() for line in text.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{listed_in or 'the list'} is not a text file in UTF-8: {error}") from None
    for line in lines:
        if not line or line.startswith("#"):
            continue
        if is_url(line):
            refuse_login(line, "the address of an image")
            yield ImageSource(line, url=line)
            continue
        beside = Path(os.path.dirname(listed_in), line)  # as lists of YOLO are meant; `find` makes the other kind
        yield _one_file(Path(line) if os.path.lexists(line) and not os.path.lexists(beside) else beside)

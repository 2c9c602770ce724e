r"""The files of a data set, whether it is a folder, a zip or a tar: nothing is extracted.

Names are relative, with `/`, in Unicode's composed form, and without a folder that only wraps the data set. An archive
whose names leave it (`../x`, `/x`, `C:\x`), that holds a name twice, or that is damaged, is an AnnotationError; so is
reading more of a file than its kind can need. A link or an unreadable file matters only where it is used.
"""

import codecs
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.images import MAX_BYTES, Size, open_image, read_orientation, turned_size
from pipeline.data.sharding.converted import other_format, to_png
from pipeline.data.sharding.image_files import FileStream, ImageFile, read_image_file
from pipeline.data.sharding.orientation import Exif
from pipeline.data.sharding.sources import SUFFIXES, Entry, list_members, too_large
from pipeline.errors import AnnotationError, ShardError
from pipeline.files.shard_files import is_shard_url

IMAGE_SUFFIXES = (*SUFFIXES, ".jfif", ".jpe", ".mpo", ".gif", ".heic", ".heif", ".avif")  # the last are refused by name
HEAD_BYTES = 2**16  # by which the kind of a file is recognised
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # as some tools on Windows begin a text
MAX_TEXT_BYTES = 16 * 2**20  # of a label file
MAX_COCO_BYTES = 2**34  # of an annotation file, which is read in pieces; Objects365 has 6 GB
MAX_RATIO = 250  # of an annotation file, and of all files, in a zip; real ones are packed to a fifth to a thirtieth
PLAIN_BYTES, PLAIN_TOTAL_BYTES = 2**24, 2**30  # of a file, of all: below this the ratio does not matter
SHOWN = 3
SPLIT = re.compile(
    r"(?:obj_|images?_|labels?_|instances_)?"
    r"(?:(?P<train>train|training)|(?P<val>val|valid|validation|dev)|(?P<test>test|testing))\d*(?:_data|_images)?",
    re.IGNORECASE,
)
STRUCTURE = {"images", "labels", "annotations", "jpegimages", "imagesets"}  # folders that mean something
LEFTOVERS = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir"}  # of macOS, Windows and Synology (thumbnails)
DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True)
class Tree:
    """The files of a data set by name."""

    where: str  # as the user gave it
    entries: dict[str, Entry]

    def names(self, *suffixes: str) -> list[str]:
        """The names that end so (in lower case), in order."""
        return [name for name in self.entries if name.lower().endswith(suffixes)]

    @property
    def images(self) -> list[str]:
        """The names of all images, in order."""
        return self.names(*IMAGE_SUFFIXES)

    def read(self, name: str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
        """A small file. Raises AnnotationError: it is missing, too large or damaged."""
        file = self._usable(name, max_bytes)
        try:
            return read_image_file(file)
        except ShardError as error:
            raise AnnotationError(f"{name} in {self.where} {error}") from None

    def text(self, name: str, max_bytes: int = MAX_TEXT_BYTES) -> str:
        """A small text file in UTF-8, or in UTF-16 if it begins so. Raises AnnotationError."""
        data = self.read(name, max_bytes)
        try:
            return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise AnnotationError(f"{name} in {self.where} is not text in UTF-8 ({error}); save it as UTF-8") from None

    def head(self, name: str) -> str:
        """The first characters of a file, for recognition; empty if it cannot be read."""
        file = self.entries[name].file
        if file is None:
            return ""
        try:
            data = read_image_file(file, HEAD_BYTES)
        except ShardError:
            return ""
        return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig", "replace")

    def stream(self, name: str) -> FileStream:
        """A large file, read from its start. Raises AnnotationError."""
        file = self._usable(name, MAX_COCO_BYTES)
        if file.packed is not None and file.length > max(PLAIN_BYTES, MAX_RATIO * file.packed):
            raise AnnotationError(
                f"{name} in {self.where} would inflate {file.packed:,} bytes to {file.length:,}: this is no "
                "annotation file"
            )
        try:
            return FileStream(file)
        except (OSError, ShardError) as error:
            raise AnnotationError(f"{name} in {self.where} cannot be read: {error}") from None

    def image_size(self, name: str, exif: Exif) -> Size:
        """(height, width) of an image: as viewers show it, unless EXIF is to be ignored. Raises ShardError."""
        entry = self.entries[name]
        if entry.file is None:
            raise ShardError(entry.fault)
        if entry.file.length > MAX_BYTES:
            raise ShardError(too_large(entry.file.length))
        data = read_image_file(entry.file, HEAD_BYTES)
        if other_format(data):
            data = to_png(read_image_file(entry.file))
        try:
            image = open_image(data)
        except ShardError:  # long metadata can push the header further back
            if len(data) >= entry.file.length:
                raise
            image = open_image(read_image_file(entry.file))
        size = (image.height, image.width)
        return size if exif == "ignore" else turned_size(size, read_orientation(image))

    def _usable(self, name: str, max_bytes: int) -> ImageFile:
        entry = self.entries.get(name)
        if entry is None:
            raise AnnotationError(f"there is no {name} in {self.where}")
        if entry.file is None:
            raise AnnotationError(f"{name} in {self.where} {entry.fault}")
        if entry.file.length > max_bytes:
            raise AnnotationError(
                f"{name} in {self.where} has {entry.file.length:,} bytes, over the cap {max_bytes:,} for such files"
            )
        return entry.file


def open_tree(path: str) -> Tree:
    """List the files of a folder, zip or tar.

    Raises:
        AnnotationError: there is nothing, or nothing that can be read safely.
    """
    if is_shard_url(path):
        raise AnnotationError(f"{path} is a URL; a data set is a folder, a zip or a tar on disk")
    root = Path(os.path.abspath(path))
    try:
        if not root.exists():
            raise AnnotationError(f"there is no data set {path}; give a folder, a zip or a tar")
        if root.is_dir():
            entries = list(_walk(root))
        else:
            _check_is_archive(root)
            entries = list_members(root, MAX_COCO_BYTES)
            _check_names(path, entries)
            _check_total(path, entries, root.stat().st_size)
    except OSError as error:
        raise AnnotationError(f"cannot read {error.filename or path}: {error.strerror or error}") from None
    named = [(unicodedata.normalize("NFC", _clean(entry.name)), entry) for entry in entries]
    kept = [(name, entry) for name, entry in named if name and not _is_hidden(name)]
    if repeated := [name for name, count in Counter(name for name, _ in kept).items() if count > 1]:
        raise AnnotationError(f"{path} holds the same name twice: {_listed(repeated)}; pack it again")
    files = _without_wrapper(dict(sorted(kept)))
    if not files:
        raise AnnotationError(f"{path} holds no files")
    return Tree(path, files)


def split_of(name: str) -> str | None:
    """The split that a folder, or a file without its suffix, is named after: `train`, `val`, `test` or None."""
    match = SPLIT.fullmatch(name)
    return None if match is None else match.lastgroup


def split_of_path(path: str) -> str | None:
    """The split that the innermost folder of a file is named after that is named after one."""
    found = (split_of(part) for part in reversed(path.split("/")[:-1]))
    return next((split for split in found if split), None)


def _walk(root: Path) -> Iterator[Entry]:
    """Raises OSError for a folder that cannot be listed."""

    def fail(error: OSError) -> None:
        raise error

    visited = set()
    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # a link to a folder above
            below.clear()
            continue
        visited.add(real)
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, root).replace(os.sep, "/")
            try:
                status = os.stat(path)
            except OSError as error:
                yield Entry(name, None, f"cannot be read: {error.strerror}")
                continue
            if stat.S_ISREG(status.st_mode):
                yield Entry(name, ImageFile(path, status.st_size, status.st_mtime_ns))
            else:
                yield Entry(name, None, "is not a plain file")


def _check_is_archive(root: Path) -> None:
    """Raise AnnotationError for files that are often given instead of an archive."""
    with root.open("rb") as file:
        head = file.read(8)
    if head.lstrip()[:1] in (b"{", b"["):
        raise AnnotationError(
            f"{root} is a JSON file; give the folder or archive that holds it and its images (jobs.lint and jobs.shard "
            "also take ANNOTATIONS and IMAGES)"
        )
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        raise AnnotationError(f"{root} is compressed in a way that allows no access by name; unpack it, or use a zip")


def _check_names(path: str, entries: list[Entry]) -> None:
    """Raise AnnotationError if names of an archive leave it."""
    hostile = [
        entry.name
        for entry in entries
        if (slashed := entry.name.replace("\\", "/")).startswith("/")
        or ".." in slashed.split("/")
        or DRIVE.match(slashed)
        or any(character < " " for character in slashed)
    ]
    if hostile:
        raise AnnotationError(
            f"{path} has names that leave it or hold control characters: {_listed(hostile)}; it is not read"
        )


def _check_total(path: str, entries: list[Entry], size: int) -> None:
    """Raise AnnotationError if the members of an archive have far more bytes than a data set of its size can have."""
    total = sum(entry.file.length for entry in entries if entry.file)
    if total > max(PLAIN_TOTAL_BYTES, MAX_RATIO * size):
        raise AnnotationError(f"{path} would inflate {size:,} bytes to {total:,}: this is no data set")


def _clean(name: str) -> str:
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in LEFTOVERS for part in name.split("/"))


def _without_wrapper(files: dict[str, Entry]) -> dict[str, Entry]:
    """The files without the folders that hold all of them and mean nothing."""
    while files:
        first = {name.partition("/")[0] for name in files}
        (folder,) = first if len(first) == 1 else ("",)
        if not folder or folder in files or split_of(folder) or folder.lower() in STRUCTURE:
            break
        files = {name.partition("/")[2]: entry for name, entry in files.items()}
    return files


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"{name!r:.120}" for name in names[:SHOWN]) + more

"""Finding the pictures of a data set: files of a folder, members of a zip, of a tar, or of a folder of tars.

Used by `shards` and `lint`. A folder is asked for each file, an archive's directory is read once. What cannot be used
is a finding of `rules`; a place that is none of these is an AnnotationError.
"""

import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.images import MAX_BYTES
from pipeline.data.pictures import Picture
from pipeline.data.rules import Findings, Rule
from pipeline.data.storage import is_url
from pipeline.data.tars import named, walk
from pipeline.errors import AnnotationError, ShardError

ENCRYPTED = 1  # flag bit of a zip's member


@dataclass(frozen=True)
class _Entry:
    """A member of an archive: its picture, or why it cannot be one."""

    name: str
    picture: Picture | None
    fault: str = ""


def find_pictures(images: str, names: Sequence[str], findings: Findings) -> dict[str, Picture]:
    """The picture of each name that has a usable one.

    Args:
        images: folder of files, zip, tar, or folder of tars. A common folder inside of an archive is found by itself.
        names: relative paths, as the annotations give them.
        findings: missing pictures, and those that cannot be read as they lie, are added to it.

    Raises:
        AnnotationError: there is no such folder or archive, or it is damaged.
    """
    names = list(dict.fromkeys(names))
    if is_url(images):
        raise AnnotationError(f"{images} is a URL; pictures are read from a folder, a zip or a tar on disk")
    root = Path(os.path.abspath(images))
    try:
        if not root.exists():
            raise AnnotationError(f"there is no image folder, zip or tar {images}")
        if root.is_dir():
            tars = sorted(root.glob("*.tar"))
            if not tars or any((root / name).exists() for name in names[:1]):
                return _from_folder(root, names, findings)
            return _match([entry for tar in tars for entry in _tar_entries(tar)], names, findings)
        is_zip = root.suffix.lower() == ".zip" or zipfile.is_zipfile(root)
        return _match(list(_zip_entries(root) if is_zip else _tar_entries(root)), names, findings)
    except OSError as error:
        raise AnnotationError(f"cannot read {error.filename or images}: {error.strerror or error}") from None


def _from_folder(root: Path, names: Sequence[str], findings: Findings) -> dict[str, Picture]:
    found = {}
    for name in names:
        path = str(root / name)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            findings.add(Rule.MISSING_PICTURE, name)
            continue
        except OSError as error:
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} cannot be read: {error.strerror}")
            continue
        if not stat.S_ISREG(status.st_mode):
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} is no plain file")
        elif status.st_size > MAX_BYTES:
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} {_too_large(status.st_size)}")
        else:
            found[name] = Picture(path, status.st_size, status.st_mtime_ns)
    return found


def _zip_entries(path: Path) -> Iterator[_Entry]:
    """Raises AnnotationError if the directory cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise AnnotationError(f"{path} is a damaged zip: {error}") from None
    for member in members:
        size, packed = member.file_size, member.compress_size
        deflated = member.compress_type == zipfile.ZIP_DEFLATED
        if member.flag_bits & ENCRYPTED:
            yield _Entry(member.filename, None, "is encrypted")
        elif not deflated and member.compress_type != zipfile.ZIP_STORED:
            yield _Entry(member.filename, None, "is compressed by another method than deflate")
        elif max(size, packed) > MAX_BYTES:
            yield _Entry(member.filename, None, _too_large(max(size, packed)))
        else:
            picture = Picture(str(path), size, member.CRC, member.header_offset, packed, deflated)
            yield _Entry(member.filename, picture)


def _tar_entries(path: Path) -> Iterator[_Entry]:
    """Raises AnnotationError if it is no plain tar, or a damaged one."""
    where = str(path)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        try:
            for member in named(walk(read, status.st_size, where), read, where):
                name = member.name.removeprefix("./")
                if not member.plain:
                    yield _Entry(name, None, f"is no plain file but a {member.what} in its tar")
                elif member.length > MAX_BYTES:
                    yield _Entry(name, None, _too_large(member.length))
                else:
                    yield _Entry(name, Picture(where, member.length, status.st_mtime_ns, member.offset))
        except ShardError as error:
            raise AnnotationError(f"{error}; pictures are read from folders, zips and uncompressed tars") from None


def _match(entries: Sequence[_Entry], names: Sequence[str], findings: Findings) -> dict[str, Picture]:
    folder = _common_folder(entries, frozenset(names))
    members: dict[str, list[_Entry]] = {name: [] for name in names}
    for entry in entries:
        if entry.name.startswith(folder) and (name := entry.name[len(folder) :]) in members:
            members[name].append(entry)
    found = {}
    for name, same in members.items():
        if not same:
            findings.add(Rule.MISSING_PICTURE, name)
        elif len(same) > 1:
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} is there {len(same)} times")
        elif same[0].picture is None:
            findings.add(Rule.UNREADABLE_PICTURE, f"{name} {same[0].fault}")
        else:
            found[name] = same[0].picture
    return found


def _common_folder(entries: Sequence[_Entry], names: frozenset[str]) -> str:
    """The folder inside of an archive below which most names are: `train2017/` in COCO's own zips, else none."""
    folders: Counter[str] = Counter()
    for entry in entries:
        start = 0
        while True:
            if entry.name[start:] in names:
                folders[entry.name[:start]] += 1
            at = entry.name.find("/", start)
            if at < 0:
                break
            start = at + 1
    return min(folders, key=lambda folder: (-folders[folder], len(folder), folder), default="")


def _too_large(size: int) -> str:
    return f"has {size:,} bytes, over the cap {MAX_BYTES:,}; re-encode it"

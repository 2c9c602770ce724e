"""Finds the images of a data set: files of a folder, members of a zip, of a tar, or of a folder of tars.

Each file of a folder is checked by name; an archive's directory is read once. An image that cannot be used is a
finding of `rules`; a path that is none of these sources is an AnnotationError.
"""

import os
import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.data.images import MAX_BYTES
from pipeline.data.sharding.image_files import ImageFile
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.data.sharding.tars import resolve_names, walk_headers
from pipeline.errors import AnnotationError, ShardError
from pipeline.files.shard_files import is_shard_url

MAX_PROBES = 100  # names that are searched in sub-folders
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ENCRYPTED, UTF8 = 1, 0x800  # flag bits of a zip's member


@dataclass(frozen=True)
class Entry:
    """A member of an archive: its image's bytes, or the reason why it cannot be used."""

    name: str
    file: ImageFile | None
    fault: str = ""


def find_image_files(
    images: str, names: Sequence[str], findings: Findings, refused: Collection[str] | None = None
) -> dict[str, ImageFile]:
    """Find the usable image file of each name.

    Args:
        images: folder of files, zip, tar, or folder of tars. If all names lie in one folder inside of it (of an
            archive: at any depth), that folder is found automatically.
        names: relative paths, as the annotations give them.
        findings: missing and unreadable files are added to it.
        refused: if given, image files that are not in `names` are findings too, except these names (without folders).

    Raises:
        AnnotationError: there is no such folder or archive, it is damaged, or several of its folders match.
    """
    names = list(dict.fromkeys(names))
    if is_shard_url(images):
        raise AnnotationError(f"{images} is a URL; images are read from a folder, a zip or a tar on disk")
    root = Path(os.path.abspath(images))
    try:
        if not root.exists():
            raise AnnotationError(f"there is no image folder, zip or tar {images}")
        if root.is_dir():
            tars = sorted(root.glob("*.tar"))
            if not tars or any((root / name).exists() for name in names[:1]):
                return _from_folder(_find_subfolder(root, names), names, findings, refused)
            return _match([entry for tar in tars for entry in list_members(tar)], names, findings, refused)
        return _match(list_members(root), names, findings, refused)
    except OSError as error:
        raise AnnotationError(f"cannot read {error.filename or images}: {error.strerror or error}") from None


def _find_subfolder(root: Path, names: Sequence[str]) -> Path:
    """`root`, or its one sub-folder with the images if `root` has none of the first names."""
    probes = names[:MAX_PROBES]
    if any(_is_there(root / name) for name in probes):
        return root
    counts = {path: sum(_is_there(path / name) for name in probes) for path in sorted(root.iterdir()) if path.is_dir()}
    best = [path for path, count in counts.items() if count and count == max(counts.values())]
    if len(best) > 1:
        raise AnnotationError(f"{best[0]} and {best[1]} both hold images of these names; give one of them")
    return best[0] if best else root


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, no permission, or characters that the locale lacks
        return False


def _from_folder(
    root: Path, names: Sequence[str], findings: Findings, refused: Collection[str] | None
) -> dict[str, ImageFile]:
    found = {}
    for name in names:
        path = str(root / name)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            findings.add(Rule.MISSING_FILE, name)
            continue
        except OSError as error:
            findings.add(Rule.UNREADABLE_FILE, f"{name} cannot be read: {error.strerror}")
            continue
        except ValueError as error:  # the locale lacks these characters
            findings.add(Rule.UNREADABLE_FILE, f"{name} is not a file name on this machine: {error}")
            continue
        if not stat.S_ISREG(status.st_mode):
            findings.add(Rule.UNREADABLE_FILE, f"{name} is not a plain file")
        elif status.st_size > MAX_BYTES:
            findings.add(Rule.UNREADABLE_FILE, f"{name} {too_large(status.st_size)}")
        else:
            found[name] = ImageFile(path, status.st_size, status.st_mtime_ns)
    if refused is not None:
        walked = os.walk(root)
        there = (os.path.relpath(os.path.join(folder, file), root) for folder, _, files in walked for file in files)
        _add_unlisted(there, names, refused, findings)
    return found


def _add_unlisted(there: Iterable[str], names: Sequence[str], refused: Collection[str], findings: Findings) -> None:
    """Add a finding for each image file, by suffix, without an entry; hidden files (`._a.jpg` of macOS) are none."""
    known = {_plain(name) for name in names}
    more = (name for name in there if name.lower().endswith(SUFFIXES) and name not in known)
    unlisted = sorted(
        name for name in more if (last := name.rpartition("/")[2]) not in refused and not last.startswith(".")
    )
    findings.add_all(Rule.UNLISTED_FILE, unlisted, to_printable)


def to_printable(name: str) -> str:
    """A file name that can be printed: names on a disk may hold any bytes."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def list_members(path: Path, max_bytes: int | None = None) -> list[Entry]:
    """The members of a zip or tar; those over `max_bytes` (MAX_BYTES) cannot be used.

    Raises:
        AnnotationError: it is neither, or damaged.
        OSError: it cannot be read.
    """
    max_bytes = MAX_BYTES if max_bytes is None else max_bytes
    is_zip = path.suffix.lower() == ".zip" or zipfile.is_zipfile(path)
    return list(_zip_entries(path, max_bytes) if is_zip else _tar_entries(path, max_bytes))


def _zip_entries(path: Path, max_bytes: int) -> Iterator[Entry]:
    """Raises AnnotationError if the directory cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise AnnotationError(f"{path} is a damaged zip: {error}") from None
    for member in members:
        size, packed = member.file_size, member.compress_size
        deflated = member.compress_type == zipfile.ZIP_DEFLATED
        if not member.filename or member.filename.endswith("/"):  # a folder, or nothing that a list could name
            continue
        name = _plain(_decode_name(member))
        if member.flag_bits & ENCRYPTED:
            yield Entry(name, None, "is encrypted")
        elif not deflated and member.compress_type != zipfile.ZIP_STORED:
            yield Entry(name, None, "is compressed by another method than deflate")
        elif max(size, packed) > max_bytes:
            yield Entry(name, None, too_large(max(size, packed)))
        else:
            file = ImageFile(str(path), size, member.CRC, member.header_offset, packed, deflated)
            yield Entry(name, file)


def _decode_name(member: zipfile.ZipInfo) -> str:
    """A member's name. Some tools, such as macOS, write UTF-8 without the flag that says so."""
    if member.flag_bits & UTF8:
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _tar_entries(path: Path, max_bytes: int) -> Iterator[Entry]:
    """Raises AnnotationError if the file is not a plain tar or is damaged."""
    where = str(path)
    with path.open("rb") as file:
        status = os.fstat(file.fileno())

        def read(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        try:
            for member in resolve_names(walk_headers(read, status.st_size, where), read, where):
                name = _plain(member.name)
                if member.kind == tarfile.DIRTYPE:
                    continue
                if not member.plain:
                    yield Entry(name, None, f"is not a plain file but a {member.what} in its tar")
                elif member.length > max_bytes:
                    yield Entry(name, None, too_large(member.length))
                else:
                    yield Entry(name, ImageFile(where, member.length, status.st_mtime_ns, member.offset))
        except ShardError as error:
            raise AnnotationError(f"{error}; images are read from folders, zips and uncompressed tars") from None


def _match(
    entries: Sequence[Entry], names: Sequence[str], findings: Findings, refused: Collection[str] | None
) -> dict[str, ImageFile]:
    members: dict[str, list[Entry]] = {_plain(name): [] for name in names}
    folder = _common_folder(entries, members.keys())
    for entry in entries:
        if entry.name.startswith(folder) and (name := entry.name[len(folder) :]) in members:
            members[name].append(entry)
    found = {}
    for name in names:
        same = members[_plain(name)]
        if not same:
            findings.add(Rule.MISSING_FILE, name)
        elif len(same) > 1:
            findings.add(Rule.UNREADABLE_FILE, f"{name} occurs {len(same)} times")
        elif same[0].file is None:
            findings.add(Rule.UNREADABLE_FILE, f"{name} {same[0].fault}")
        else:
            found[name] = same[0].file
    if refused is not None:
        there = (entry.name[len(folder) :] for entry in entries if entry.name.startswith(folder))
        _add_unlisted(there, names, refused, findings)
    return found


def _plain(name: str) -> str:
    """A path without `./` and `//`, which folders ignore and archives do not."""
    return str(PurePosixPath(name)) if "./" in name or "//" in name else name


def _common_folder(entries: Sequence[Entry], names: Collection[str]) -> str:
    """The folder in an archive that holds most names, such as `train2017/` in COCO's zips; else an empty string."""
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


def too_large(size: int) -> str:
    """What is wrong with an image of more than MAX_BYTES."""
    return f"has {size:,} bytes, over the cap {MAX_BYTES:,}; re-encode it"

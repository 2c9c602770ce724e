"""Output files of commands: named by the user, or under a derived name.

A file that the user names is replaced atomically; an input is never overwritten. A file that cannot be written is an
InputError before the work starts, if that can be checked then, and a StorageError afterwards.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, count, permutations
from pathlib import Path

from pipeline.errors import InputError, StorageError
from pipeline.files.atomic import write_file

# Of runs, checkpoints and shards, which cannot be read without them.
RECORDS = frozenset({"run.json", "evaluations.json", "state.json", "checkpoint_manager_snapshot.json"})
RECORDS |= {"index.json", "summary.json", "samples.npy"}
SQLITE = b"SQLite format 3\0"  # the first bytes of a database, such as MLflow's


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output that cannot be written or must not be overwritten.

    Args:
        path: the file that the user named; it may exist.
        inputs: files and folders that the command reads; nothing in these folders may be written.

    Raises:
        InputError: `path` is a folder, lies below a file or in a folder without permission, is an input, or a record
            or database of this project.
    """
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is not a regular file; name another one")
    real = Path(os.path.realpath(path))
    if any(source == real or source in real.parents for source in map(Path, map(os.path.realpath, inputs))):
        raise InputError(f"cannot write {path}: it is an input of this command; choose another name")
    if real.exists() and (real.name in RECORDS or _is_database(real)):
        raise InputError(
            f"cannot write {path}: it is a file of a run, a checkpoint, shards or MLflow; choose another name"
        )
    folder = next(parent for parent in real.parents if parent.exists())
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: {folder} is not a folder; choose another name")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: no permission in {folder}; choose another folder")


def check_outputs(paths: Sequence[Path], inputs: Iterable[Path] = ()) -> None:
    """`check_output` for each output of a command, and `check_apart` for all. Raises InputError."""
    inputs = list(inputs)
    for path in paths:
        check_output(path, inputs)
    check_apart(paths)


def check_apart(paths: Sequence[Path]) -> None:
    """Raise InputError if an output would replace another one of the same command, or would have to lie in its file."""
    real = [Path(os.path.realpath(path)) for path in paths]
    for one, other in permutations(range(len(paths)), 2):
        if real[one] == real[other] or real[one] in real[other].parents:
            raise InputError(f"{paths[one]} and {paths[other]} cannot both be written; choose another name for one")


def _is_database(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:  # a file without read permission may still be replaced
        return False


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named, atomically, as UTF-8. Raises StorageError."""
    try:
        write_file(path, text.encode())
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another path") from None


def derive_names(
    folder: Path, inputs: Sequence[Path], suffix: str, is_own: Callable[[Path], bool], prefix: str = ""
) -> list[Path]:
    """Derive an output file for each input: `STEM.png`, or the first free one of `STEM-2.png`, `STEM-3.png`, ...

    A name is free if no file has it, or only a file that this project wrote. Names of inputs and names that are already
    derived are not free. Upper and lower case are equal, because some file systems do not distinguish them.

    Args:
        folder: where the files will be written; need not exist.
        inputs: files that are read; several may have the same stem.
        suffix: e.g. `.png`.
        is_own: whether an existing file was written by this project.
        prefix: before the stem.
    """
    used = {_key(path) for path in inputs}
    names = []
    for path in inputs:
        candidates = (
            folder / f"{prefix}{path.stem}{number}{suffix}" for number in chain([""], (f"-{n}" for n in count(2)))
        )
        name = next(c for c in candidates if _key(c) not in used and (is_own(c) or not os.path.lexists(c)))
        used.add(_key(name))
        names.append(name)
    return names


def _key(path: Path) -> str:
    return os.path.realpath(path).casefold()

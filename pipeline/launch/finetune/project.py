"""`finetune.json` in the run's folder: the data set, what was chosen for it, and what is done since the training.

It is written when the data set was accepted, before the first shard. A data set that has changed since is a RunError,
and so is a folder that holds something else.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.data.importing.tree import open_tree
from pipeline.data.index import INDEX
from pipeline.data.sharding.image_files import FileStream
from pipeline.errors import RunError, ShardError
from pipeline.files.atomic import UNFINISHED, write_file
from pipeline.files.folder_lock import FILE as LOCK
from pipeline.launch.finetune.stages import Stage
from pipeline.runs.record import run_exists

FILE = "finetune.json"
VERSION = 1
DATA = "data"  # folder of the shards, in the run's
PIECE_BYTES = 2**22


@dataclass(frozen=True)
class Fingerprint:
    """What tells a data set from another."""

    digest: str  # sha256 over the names and bytes of all its files, in order
    files: int


@dataclass(frozen=True)
class Project:
    """A fine-tuning that has begun."""

    dataset: str  # path, absolute
    fingerprint: str  # of all its files
    options: str  # how it is read, see `describe_options`
    preset: str
    settings: tuple[str, ...]  # that were chosen for it
    splits: tuple[str, ...]
    done: dict[str, str]  # stage -> checkpoint, and for the registration its name and alias
    files: int = 0  # of the data set; 0 in a project of an older version

    def with_done(self, stage: Stage, mark: str) -> "Project":
        """The project with one more stage done."""
        return replace(self, done=self.done | {stage.name: mark})

    def has_shards(self, folder: Path) -> bool:
        """Whether every split has an index; a build writes them when all tars are complete."""
        return all((folder / DATA / split / INDEX).is_file() for split in self.splits)


def read_project(folder: Path) -> Project | None:
    """The project in a run's folder; None if the folder is free.

    Raises:
        RunError: the folder holds something else, or the file is damaged or of another version.
    """
    path = folder / FILE
    try:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            others = [entry.name for entry in folder.iterdir() if entry.name != LOCK] if folder.exists() else []
            if not all(UNFINISHED.match(name) for name in others):
                raise RunError(
                    f"{folder} was not made by jobs.finetune (it has no {FILE}); choose another name="
                ) from None
            return None
        document = json.loads(content)
        if document.pop("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        settings, splits = (tuple(document.pop(key)) for key in ("settings", "splits"))
        return Project(settings=settings, splits=splits, **document)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}; set storage to a folder that you may use") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged ({error}); choose another name=, or remove {folder} with all that was learned there"
        ) from None


def write_project(folder: Path, project: Project) -> None:
    """Write the file, atomically. Raises OSError."""
    write_file(folder / FILE, json.dumps({"version": VERSION, **asdict(project)}, indent=1).encode())


def check_same_data(project: Project, folder: Path, dataset: str, now: Fingerprint, options: str) -> None:
    """Refuse a data set that is not the one that `project` began with.

    Raises:
        RunError: its files, or the flags that say how it is read, have changed.
    """
    if project.options != options:
        raise RunError(
            f"{folder} was begun with {project.options or 'no flags'} and now has {options or 'none'}; give the same "
            "flags, or a new name="
        )
    if project.fingerprint != now.digest:
        change = "a file has other bytes or another name"
        if project.files not in (0, now.files):
            change = f"{project.files:,} files then, {now.files:,} now"
        learned = f" (model.init_from={folder} starts from what was learned)" if run_exists(str(folder)) else ""
        raise RunError(
            f"the data set {dataset} has changed since {folder} began with {project.dataset} ({change}); give the old "
            f"files, or a new name={learned}"
        )


def fingerprint_of(dataset: str) -> Fingerprint:
    """The fingerprint of a data set.

    Raises:
        AnnotationError: there is no data set, or it cannot be read safely.
    """
    digest, entries = hashlib.sha256(), open_tree(dataset).entries
    for name, entry in entries.items():
        head = f"{name}\0{entry.file.length if entry.file else -1}\0"
        digest.update(head.encode(errors="surrogatepass"))  # a name on a disk may hold any bytes
        if entry.file is None:
            continue
        try:
            stream = FileStream(entry.file)
            try:
                while piece := stream.read(PIECE_BYTES):
                    digest.update(piece)
            finally:
                stream.close()
        except (OSError, ShardError):  # the check of the data set names the file
            digest.update(b"unreadable")
    return Fingerprint(digest.hexdigest(), len(entries))

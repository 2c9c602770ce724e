"""Check of MLflow's SQLite file before MLflow opens it. Raises TrackingError and TrackingInputError."""

import contextlib
import errno
import os
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from pipeline.errors import TrackingError, TrackingInputError
from pipeline.files.sqlite_uri import sqlite_uri

LOCK_SECONDS = 5.0  # for another process to release its lock
TRANSIENT_ERRORS = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_IOERR", "SQLITE_PROTOCOL")  # errors that may pass


def check_database(path: Path, knob: str) -> None:
    """Refuse a SQLite file that MLflow would retry for minutes, migrate, or fill although it is not MLflow's.

    Args:
        path: the file; a missing or empty one is left to MLflow, and its folder is created.
        knob: the setting or flag that named it, for messages.

    Raises:
        TrackingError: it is locked.
        TrackingInputError: it is damaged, not MLflow's, or of another version of MLflow, or cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() and not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            return
        uri = f"file:{quote(str(path))}?mode=rw"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=LOCK_SECONDS)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            known = "alembic_version" in tables
            found = database.execute("SELECT version_num FROM alembic_version").fetchone() if known else None
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname.startswith(TRANSIENT_ERRORS):
            raise TrackingError(f"the MLflow database {path} ({knob}) does not answer: {error}; try again") from None
        raise TrackingInputError(
            f"{path} ({knob}) cannot be read as an MLflow database: {error}; move it away or give another address"
        ) from None
    except OSError as error:
        raise TrackingInputError(f"cannot write into {path.parent} ({knob}): {error.strerror}") from None
    if tables and not {"alembic_version", "experiments"} & tables:
        raise TrackingInputError(f"{path} ({knob}) is not an MLflow database; give another address")
    if found is not None and found[0] != (wanted := _schema()):
        raise TrackingInputError(
            f"{path} ({knob}) is of another version of MLflow (schema {found[0]}, not {wanted}); use that version, or "
            f"copy the file and run `mlflow db upgrade {sqlite_uri(str(path))}`"
        )


def check_new_database(path: Path, knob: str) -> None:
    """Refuse a file that does not exist and cannot be created; nothing is written. Arguments as in `check_database`.

    Raises:
        TrackingInputError: its folder is a file, or cannot be written or created.
    """
    there = next(folder for folder in path.parents if os.path.lexists(folder))
    reason = errno.ENOTDIR if not there.is_dir() else 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    if reason:
        raise TrackingInputError(f"cannot write into {path.parent} ({knob}): {os.strerror(reason)}")


def _schema() -> str:
    """The schema version that the installed MLflow writes into `alembic_version`."""
    from alembic.script import ScriptDirectory

    spec = find_spec("mlflow")  # without importing it
    folder = Path(str(spec and spec.origin)).parent / "store" / "db_migrations"
    return str(ScriptDirectory(str(folder)).get_current_head())

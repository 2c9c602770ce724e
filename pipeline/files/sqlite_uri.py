"""Addresses of SQLite databases: `sqlite:///runs/mlflow.db`, in any working folder.

SQLAlchemy 2.1 reads `%20` in an address as a space and `?` as the beginning of options. So the working folder's name is
encoded when a relative address becomes absolute; the user's part is kept as SQLAlchemy reads it. An encoded address
names its driver, `sqlite+pysqlite`, because for plain `sqlite:///` MLflow would create the folder of the path without
decoding it. An address without a file is a ValueError.
"""

import os
from pathlib import Path
from urllib.parse import unquote

SCHEMES = ("sqlite", "sqlite+pysqlite")


def is_sqlite(uri: str) -> bool:
    """Whether the address has a scheme of SQLite."""
    return uri.partition("://")[0] in SCHEMES


def sqlite_uri(path: str) -> str:
    """The address of the database at a path."""
    encoded = path.replace("%", "%25").replace("?", "%3F")
    return f"{'sqlite' if encoded == path else 'sqlite+pysqlite'}:///{encoded}"


def sqlite_file(uri: str) -> Path | None:
    """The database file of a SQLite address; None for other addresses and for one without a file."""
    scheme, _, rest = uri.partition(":///")
    path = unquote(rest.partition("?")[0])
    return Path(path) if scheme in SCHEMES and path else None


def absolute_sqlite(uri: str) -> str:
    """Make the address's path absolute against the current folder; `~` is the home folder.

    Raises:
        ValueError: it names no file.
    """
    path = sqlite_file(uri)
    if path is None:
        raise ValueError(f"'{uri}' names no file")
    options = "".join(uri.partition("?")[1:])
    return sqlite_uri(os.path.abspath(path.expanduser())) + options

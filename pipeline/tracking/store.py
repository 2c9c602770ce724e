"""Which MLflow store counts: one rule for every command, and which addresses are legal.

`--tracking-uri`, then `tracking.uri` where it is set, then the store of an existing run, then `MLFLOW_TRACKING_URI`,
then `sqlite:///runs/mlflow.db`. A `TrackingStore` holds no login: that of `MLFLOW_TRACKING_URI` is put in by
`mlflow_client.connect`, in each process that has the variable.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import ConfigError
from pipeline.files.credentials import refuse_login, without_login
from pipeline.files.sqlite_uri import absolute_sqlite, is_sqlite
from pipeline.runs.record import RunRecord

DEFAULT = "sqlite:///runs/mlflow.db"
FLAG, SETTING, RECORD, VARIABLE = "--tracking-uri", "tracking.uri", "the run's record", "MLFLOW_TRACKING_URI"
SERVERS = ("http", "https", "postgresql", "mysql", "mssql")


@dataclass(frozen=True)
class TrackingStore:
    """An MLflow store."""

    uri: str  # absolute, without a login
    knob: str = SETTING  # what named it, for messages


def choose_store(flag: str | None = None, setting: str = "", record: RunRecord | None = None) -> TrackingStore:
    """The store that counts.

    Args:
        flag: `--tracking-uri`.
        setting: `tracking.uri` of the config.
        record: of an existing run; a login that an old one may hold is left out.

    Raises:
        ConfigError: the address that counts is none, or holds a login; the message names where it was given.
    """
    for address, knob in ((flag or "", FLAG), (setting, SETTING)):
        if address:
            return TrackingStore(resolve_uri(address, knob), knob)
    recorded = record.config.get("tracking", {}).get("uri", "") if record else ""
    for address, knob in ((recorded, RECORD), (os.environ.get(VARIABLE, ""), VARIABLE)):
        if address:
            return TrackingStore(resolve_uri(without_login(address), knob), knob)
    return TrackingStore(resolve_uri(DEFAULT), "the default")


def resolve_uri(uri: str, knob: str = SETTING) -> str:
    """Make a relative SQLite path absolute, so that workers in other folders open the same file.

    Raises:
        ConfigError: neither a database nor a server (MLflow no longer supports plain folders), or it holds a login.
    """
    refuse_login(uri, knob)
    if is_sqlite(uri):
        try:
            return absolute_sqlite(uri)
        except ValueError as error:
            raise ConfigError(f"{knob}: {error}; write {DEFAULT}") from None
    scheme, _, rest = uri.partition("://")
    if not rest or scheme.partition("+")[0] not in SERVERS:
        raise ConfigError(f"{knob}: '{uri}' is no MLflow address; write {DEFAULT} or http://HOST:PORT")
    return uri.rstrip("/")


def pages(uri: str) -> str:
    """Where MLflow's pages of a resolved address are: the address of a server, or the command that shows a database."""
    return uri if uri.startswith("http") else f"{Path(sys.executable).parent}/mlflow ui --backend-store-uri {uri}"


def with_login(uri: str) -> str:
    """The address to connect to: `MLFLOW_TRACKING_URI` in full where `uri` is it without its login.

    A web server's login goes into MLflow's own variables instead, so that no message of MLflow can repeat it.
    """
    full = os.environ.get(VARIABLE, "").rstrip("/")
    if full == uri or without_login(full) != uri:
        return uri
    if not uri.startswith("http"):
        return full
    parts = urlsplit(full)
    if parts.username and parts.password is not None:
        os.environ.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username))
        os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password))
    return uri

"""The choice of the MLflow store, with one rule for every command, and the check of its address.

The order is `--tracking-uri`, `tracking.uri`, the store of an existing run, `MLFLOW_TRACKING_URI`, and
`sqlite:///runs/mlflow.db`. A `TrackingStore` contains no login: `client.connect` adds that of `MLFLOW_TRACKING_URI` in
each process that has the variable. Raises ConfigError.
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
    knob: str = SETTING  # the setting, flag or variable that named it, for messages


def choose_store(flag: str | None = None, setting: str = "", record: RunRecord | None = None) -> TrackingStore:
    """Choose the store by the order above.

    Args:
        flag: `--tracking-uri`.
        setting: `tracking.uri` of the config.
        record: of an existing run; a login in an old record is removed.

    Raises:
        ConfigError: the address is not valid, or contains a login; the message names where it was given.
    """
    for address, knob in ((flag or "", FLAG), (setting, SETTING)):
        if address:
            return TrackingStore(resolve_uri(address, knob), knob)
    recorded = record.config.get("tracking", {}).get("uri", "") if record else ""
    for address, knob in ((recorded, RECORD), (os.environ.get(VARIABLE, ""), VARIABLE)):
        if address:
            return TrackingStore(resolve_uri(without_login(address), knob), knob)
    return TrackingStore(resolve_uri(DEFAULT), "the default")


def how_to_find(store: TrackingStore) -> str:
    """What another command needs to read this store; empty if it is the one that commands use by themselves."""
    return "" if store.uri == choose_store().uri else f" (other commands need --tracking-uri {store.uri})"


def resolve_uri(uri: str, knob: str = SETTING) -> str:
    """Make a relative SQLite path absolute, so that workers in other folders open the same file.

    Raises:
        ConfigError: neither a database nor a server (MLflow no longer supports plain folders), or it has a login.
    """
    refuse_login(uri, knob)
    if is_sqlite(uri):
        try:
            return absolute_sqlite(uri)
        except ValueError as error:
            raise ConfigError(f"{knob}: {error}; write {DEFAULT}") from None
    scheme, _, rest = uri.partition("://")
    if not rest or scheme.partition("+")[0] not in SERVERS:
        raise ConfigError(f"{knob}: '{uri}' is not an MLflow address; write {DEFAULT} or http://HOST:PORT")
    return uri.rstrip("/")


def pages(uri: str) -> str:
    """How to open MLflow's pages: the address of a server, or the command that serves a database."""
    return uri if uri.startswith("http") else f"{Path(sys.executable).parent}/mlflow ui --backend-store-uri {uri}"


def with_login(uri: str) -> str:
    """The address to connect to: `MLFLOW_TRACKING_URI` with its login, if `uri` is the same address without one.

    A web server's login is put into MLflow's own variables instead, so that no message of MLflow can contain it.
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

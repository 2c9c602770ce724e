"""Addresses of SQLite databases survive any folder name, in SQLAlchemy and in MLflow."""

import os
import re
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from pipeline.files.sqlite_uri import absolute_sqlite, is_sqlite, sqlite_file, sqlite_uri
from pipeline.tracking.client import connect

FOLDERS = ("a%20b", "a%2Fb", "a?b", "a?uri=true", "a#b", "a b", "a%b", "größe", "a:b@c", "100%")
PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8)


@given(PATHS)
def test_sqlite_uri_path_equals_sqlalchemys(name: str) -> None:
    path = f"/folder/{name}/mlflow.db"
    uri = sqlite_uri(path)
    assert make_url(uri).database == path
    assert not make_url(uri).query
    assert str(sqlite_file(uri)) == path
    assert absolute_sqlite(uri) == uri


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("sqlite:///runs/x.db", "{here}/runs/x.db"),
        ("sqlite:///./x.db", "{here}/x.db"),
        ("sqlite:////data/x.db", "/data/x.db"),
        ("sqlite:////my%20data/x.db", "/my data/x.db"),
        ("sqlite:///~/x.db", "/home/somebody/x.db"),
    ],
)
def test_absolute_sqlite_makes_path_absolute(
    uri: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(sqlite_file(absolute_sqlite(uri))) == file.format(here=tmp_path)
    assert absolute_sqlite(f"{uri}?timeout=9") == f"{absolute_sqlite(uri)}?timeout=9"


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///", "http://host", "runs/x.db", ""])
def test_sqlite_file_address_without_file_gives_none(uri: str) -> None:
    assert sqlite_file(uri) is None
    assert is_sqlite(uri) == uri.startswith("sqlite")
    with pytest.raises(ValueError, match=re.escape(f"'{uri}'")):
        absolute_sqlite(uri)


@pytest.mark.parametrize("name", FOLDERS)
def test_sqlite_uri_opens_file_in_working_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    path = make_url(absolute_sqlite("sqlite:///mlflow.db")).database
    assert path is not None
    sqlite3.connect(path).execute("create table t(a int)").connection.close()
    assert os.listdir() == ["mlflow.db"]


def test_mlflow_folder_with_reserved_characters_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a%20b%2Fc?d#e"
    folder.mkdir()
    monkeypatch.chdir(folder)
    client = connect("sqlite:///runs/mlflow.db", create=True)
    client.create_experiment("mine")
    assert (folder / "runs" / "mlflow.db").is_file()
    assert os.listdir(tmp_path) == [folder.name]  # and no other folder was made
    assert connect("sqlite:///runs/mlflow.db").get_experiment_by_name("mine") is not None

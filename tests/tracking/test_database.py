"""An MLflow database that is damaged, locked, foreign or of another version: one line, in seconds, in every command."""

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image
from support.helpers import tiny_run

from jobs import predict, register, table
from jobs.cli import main
from pipeline.errors import TrackingError, TrackingInputError
from pipeline.runs.record import write_run
from pipeline.tracking.client import connect
from pipeline.tracking.database import check_database

COMMANDS = {
    "predict": (predict, ["models:/m@champion", "image.png"]),
    "register": (register, ["runs/tiny"]),
    "table": (table, ["demo"]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that MLflow has made."""
    path = tmp_path_factory.mktemp("whole") / "mlflow.db"
    connect(f"sqlite:///{path}", create=True)
    return path


def damage_the_header(path: Path) -> None:
    path.write_bytes(b"no database" * 500)


def damage_the_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8192 : len(content) // 2] = b"\x5a" * (len(content) // 2 - 8192)
    path.write_bytes(content)


def make_foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE customers (name TEXT)")


def make_older(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        database.execute("DROP TABLE logged_models")  # MLflow would make it again, and change the rest


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS: dict[Callable[[Path], None], str] = {
    damage_the_header: "not a database",
    damage_the_pages: "malformed",
    make_foreign: "not an MLflow database",
    make_older: "mlflow db upgrade",
    make_a_folder: "unable to open",
}


@pytest.fixture(params=FAULTS, ids=lambda fault: fault.__name__)
def faulty(request: pytest.FixtureRequest, whole: Path, tmp_path: Path) -> tuple[Path, str]:
    """A database with one of the faults, and what has to be said of it."""
    path = tmp_path / "mlflow.db"
    shutil.copyfile(whole, path)
    request.param(path)
    return path, FAULTS[request.param]


@pytest.fixture
def locked(whole: Path, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mlflow.db"
    shutil.copyfile(whole, path)
    owner = sqlite3.connect(path)
    owner.execute("BEGIN EXCLUSIVE")
    yield path
    owner.close()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tiny_run(tmp_path / "runs" / "tiny"))
    Image.new("RGB", (8, 8)).save("image.png")


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("command", COMMANDS)
def test_command_on_a_faulty_database_says_one_line(
    command: str, faulty: tuple[Path, str], capfd: pytest.CaptureFixture[str]
) -> None:
    module, arguments = COMMANDS[command]
    path, said = faulty
    before = path.read_bytes() if path.is_file() else b""
    began = time.monotonic()
    code = main(module.build_parser(), module.run, [*arguments, "--tracking-uri", f"sqlite:///{path}"])
    assert time.monotonic() - began < 30
    assert code == TrackingInputError.exit_code
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 1
    assert said in printed[0]
    assert "--tracking-uri" in printed[0]
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("command", COMMANDS)
def test_command_on_a_locked_database_says_one_line(
    command: str, locked: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.tracking.database.LOCK_SECONDS", 0.2)
    module, arguments = COMMANDS[command]
    code = main(module.build_parser(), module.run, [*arguments, "--tracking-uri", f"sqlite:///{locked}"])
    assert code == TrackingError.exit_code
    (line,) = capfd.readouterr().err.splitlines()
    assert "locked" in line


def test_new_and_empty_files_are_left_to_mlflow(whole: Path, tmp_path: Path) -> None:
    check_database(tmp_path / "new" / "mlflow.db", "tracking.uri")
    (tmp_path / "empty.db").touch()
    check_database(tmp_path / "empty.db", "tracking.uri")
    check_database(whole, "tracking.uri")
    assert (tmp_path / "empty.db").stat().st_size == 0

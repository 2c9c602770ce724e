"""A local folder and a URL behave alike; no half-written file has its final name, and nothing is written elsewhere."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

import fsspec
import pytest
from support.data import contents

from pipeline.data.sharding.output import BUILD, Output
from pipeline.errors import ShardError
from pipeline.files import retry


@pytest.fixture(params=["local", "memory", "file"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    return Output(
        {
            "local": str(tmp_path / "out"),
            "memory": f"memory://{tmp_path.name}/out",
            "file": f"file://{tmp_path}/remote/out",
        }[request.param]
    )


def test_output_prepare_write_publish_remove(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert output.names() == []
    assert output.prepare() is True
    output.write("a.json", b"{}")
    output.write(f"{BUILD}/note.json", b"1")
    assert output.prepare() is False, "an unfinished build goes on"
    with output.scratch("x.tar") as path:
        path.write_bytes(b"tar")
        assert output.size("x.tar") is None, "nothing half-written carries the name"
        output.publish(path, "x.tar")
    assert output.names() == [BUILD, "a.json", "x.tar"]
    assert output.names(BUILD) == ["note.json"]
    assert (output.read("a.json"), output.size("x.tar")) == (b"{}", 3)
    assert output.sha256("x.tar") == hashlib.sha256(b"tar").hexdigest()
    output.write("a.json", b"new")
    assert output.read("a.json") == b"new"
    output.remove("a.json")
    output.remove("a.json")
    output.remove(BUILD)
    assert (output.read("a.json"), output.size("a.json"), output.names(BUILD)) == (None, None, [])
    assert output.names() == ["x.tar"]
    with pytest.raises(ShardError, match=output.folder):
        output.prepare()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_scratch_failed_write_leaves_nothing(output: Output) -> None:
    output.prepare()
    seen = []

    def write() -> None:
        with output.scratch("x.tar") as path:
            seen.append(path)
            path.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert not seen[0].exists()
    assert output.names(BUILD) == []


def test_write_local_file_is_replaced_atomically(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.prepare()
    output.write("a", b"first")
    before = os.stat(tmp_path / "a").st_ino
    output.write("a", b"second")
    assert os.stat(tmp_path / "a").st_ino != before
    assert contents(tmp_path) == {"a": b"second"}


def test_remove_empty_removes_only_empty_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    output = Output(str(out))
    assert output.prepare() is True
    output.remove_empty()
    assert out.exists(), "it is not empty now"
    output.remove(BUILD)
    output.remove_empty()
    assert not out.exists()


def test_prepare_build_folder_as_link_is_refused(tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (out / BUILD).symlink_to(elsewhere)
    with pytest.raises(ShardError, match=str(out)):
        Output(str(out)).prepare()


def test_prepare_folder_of_a_running_build_is_refused(tmp_path: Path) -> None:
    first, second = Output(str(tmp_path / "out")), Output(str(tmp_path / "out"))
    assert first.prepare() is True
    before = contents(tmp_path)
    with pytest.raises(ShardError, match=str(tmp_path / "out")):
        second.prepare()
    assert contents(tmp_path) == before
    first.release()
    assert second.prepare() is False
    second.release()


def test_output_unwritable_address_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in ("/proc/none/out", str(tmp_path / "file" / "out"), str(tmp_path / "file")):
        with pytest.raises(ShardError, match=folder):
            Output(folder).prepare()
    for url in ("pipe:cat > x", "-", ""):
        with pytest.raises(ShardError, match=f"'{re.escape(url)}'"):
            Output(url)
    with pytest.raises(ShardError, match="nowhere://x"):
        Output("nowhere://x")
    assert contents(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # not every store translates its errors
def test_write_failing_store_is_named(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    output = Output("memory://failing/out")

    def fail(*_: object, **__: object) -> None:
        raise kind("no route to host")

    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", fail)
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)
    with pytest.raises(ShardError, match="memory://failing/out/a: no route to host"):
        output.write("a", b"")

"""`python -m jobs.shard`: what it prints and its exit codes."""

import re
from pathlib import Path

import pytest
from helpers_data import contents, edit, write_coco

from jobs.cli import main
from jobs.shard import build_parser, run


def shard(*words: object) -> int:
    return main(build_parser(), run, [str(word) for word in words])


def test_build_verify_info_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, a, b = write_coco(tmp_path), tmp_path / "a", tmp_path / "b"
    assert shard("build", *source, a, "--samples-per-shard", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["shards", "images", "boxes", "categories", "digest"]
    assert shard("build", "--samples-per-shard", 5, "--limit", 6, *source, b) == 0
    assert shard("verify", a) == 0
    assert shard("info", a) == 0
    assert re.search(r"person \(1\), sign \(13\), kite \(90\)", capsys.readouterr().out)
    assert shard("diff", a, a) == 0
    assert shard("diff", a, b) == 1
    assert "6 images only in" in capsys.readouterr().out


def test_verify_lists_faults_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert shard("build", *write_coco(tmp_path), out) == 0
    (tar,) = out.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-512])
    capsys.readouterr()
    assert shard("verify", out) == 1
    assert tar.name in capsys.readouterr().out
    edit(out / "index.json", {"version": 7})
    assert shard("verify", out) == 1
    assert shard("info", out) == 2
    assert "has version 7, this code reads 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "a.json", "images"), "build takes ANNOTATIONS IMAGES OUT; got 2 paths"),
        (("verify", "a", "b"), "verify takes OUT; got 2"),
        (("verify", "nowhere"), "there is no shard folder nowhere"),
        (("info", "pipe:cat x"), "commands are never run"),
        (("build", "nowhere.json", "images", "out"), "cannot read annotations nowhere.json"),
    ],
)
def test_wrong_input_exits_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shard(*words) == 2
    assert message in capsys.readouterr().err
    assert contents(tmp_path) == {}


def test_a_bad_file_exits_2_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_coco(tmp_path)
    before = contents(tmp_path)
    (images / "some_3.jpg").rename(images / "elsewhere.jpg")
    assert shard("build", annotations, images, tmp_path / "out") == 2
    assert "1 missing file: some_3.jpg" in capsys.readouterr().err
    (images / "elsewhere.jpg").rename(images / "some_3.jpg")
    assert contents(tmp_path) == before


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        shard("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text
    assert "verify OUT" in text

"""`python -m jobs.shard`: what it prints and its exit codes."""

import re
from pathlib import Path

import pytest
from support.data import contents, edit, pack, stopped_at_the_index, write_coco
from support.layouts import draw_truth, pack_tree, write_roboflow_coco

from jobs.cli import main
from jobs.shard import build_parser, run
from pipeline.data.index import load_index


def shard(*words: object) -> int:
    return main(build_parser(), run, [str(word) for word in words])


def test_build_verify_info_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, a, b = write_coco(tmp_path), tmp_path / "a", tmp_path / "b"
    assert shard("build", *source, a, "--samples-per-shard", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:7]] == [
        *("shards", "images", "boxes", "crowd", "dropped", "digest", "categories"),
    ]
    assert [line.split()[:2] for line in lines[8:]] == [["1", "person"], ["13", "sign"], ["90", "kite"]]
    assert shard("build", "--samples-per-shard", 5, "--limit", 6, *source, b) == 0
    assert shard("verify", a) == 0
    capsys.readouterr()
    assert shard("info", a) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[: len(lines)] == lines, "info shows what build showed"
    assert [re.sub(r"\w{16}$", "", line) for line in out[len(lines) :]] == [
        f"{name}  {samples} images  {size:,} bytes  sha256 "
        for name, samples, size in [(s.name, s.samples, s.bytes) for s in load_index(str(a)).shards]
    ]
    assert shard("diff", a, a) == 0
    assert shard("diff", a, b) == 1
    assert "6 images only in" in capsys.readouterr().out


def test_archives_sizes_and_urls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, folder = write_coco(tmp_path)
    packed = pack(folder, tmp_path / "images.zip")
    assert shard("build", annotations, packed, "memory://jobs-shard/out", "--mib-per-shard", 1, "--limit", 7) == 0
    assert shard("verify", "memory://jobs-shard/out") == 0
    assert "memory://jobs-shard/out is sound" in capsys.readouterr().out
    assert shard("build", annotations, folder, tmp_path / "out", "--limit", 7) == 0
    assert shard("diff", "memory://jobs-shard/out", tmp_path / "out") == 0


def test_stopping_a_build_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_coco(tmp_path), tmp_path / "out"
    with stopped_at_the_index():
        assert shard("build", *source, out, "--samples-per-shard", 5) == 130
    assert "finished shards are kept in" in capsys.readouterr().err
    assert shard("verify", out) == 1
    assert f"error: {out} " in capsys.readouterr().out
    assert shard("build", *source, out, "--samples-per-shard", 5) == 0
    assert shard("verify", out) == 0


def test_verify_lists_faults_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert shard("build", *write_coco(tmp_path), out) == 0
    (tar,) = out.glob("*.tar")
    tar.write_bytes(tar.read_bytes()[:-512])
    capsys.readouterr()
    assert shard("verify", out) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("error: ") and tar.name in line for line in lines)
    edit(out / "index.json", {"version": 7})
    assert shard("verify", out) == 1
    assert shard("info", out) == 2
    assert "has version 7, this code reads 1 and 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "a.json"), "build takes DATASET OUT or ANNOTATIONS IMAGES OUT; got 1 paths"),
        (("build", "nowhere.zip", "out"), "there is no data set nowhere.zip"),
        (("build", "a", "b", "c", "--format", "yolo"), "--format is for DATASET"),
        (("build", "a", "b", "--merge", "x,y"), "--merge takes a,b=c"),
        (("build", "a", "b", "--split", "0.7"), "--split is the share of each missing split"),
        (("verify", "a", "b"), "verify takes OUT; got 2"),
        (("verify", "nowhere"), "there is no shard folder nowhere"),
        (("info", "pipe:cat x"), "commands are never run"),
        (("build", "nowhere.json", "images", "out"), "cannot read annotations nowhere.json"),
        (("info", "a", "--workers", "2"), "info does not take --workers"),
        (("verify", "a", "--limit", "2"), "verify does not take --limit"),
        (("build", "a", "b", "c", "--samples-per-shard", "2", "--mib-per-shard", "2"), "exclude each other"),
        (("build", "a", "b", "c", "--limit", "0"), "at least 1"),
        (("build", "a", "b", "pipe:cat > x"), "commands are never run"),
        (("build", "a", "b", "nowhere://x"), "no writer for 'nowhere://x'"),
    ],
)
def test_wrong_input_exits_2(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert shard(*words) == 2
    assert message in capsys.readouterr().err
    assert contents(here) == {}


def test_a_bad_file_exits_2_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_coco(tmp_path)
    before = contents(tmp_path)
    (images / "some_3.jpg").rename(images / "elsewhere.jpg")
    assert shard("build", annotations, images, tmp_path / "out") == 2
    assert "missing image files (1): some_3.jpg" in capsys.readouterr().err
    (images / "elsewhere.jpg").rename(images / "some_3.jpg")
    assert contents(tmp_path) == before


def test_build_of_a_data_set_makes_a_folder_for_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_roboflow_coco(draw_truth({"train": 6, "val": 2}), tmp_path / "export")
    archive = pack_tree(tmp_path / "export", tmp_path / "export.zip")
    assert shard("build", archive, tmp_path / "out", "--drop-unused", "--split", 0.2, "--samples-per-shard", 2) == 0
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["test", "train", "val"]
    assert capsys.readouterr().out.count("categories  3\n") == 3
    assert all(shard("verify", path) == 0 for path in (tmp_path / "out").iterdir())
    assert len(load_index(str(tmp_path / "out/train")).shards) == 3


def test_build_of_a_faulty_data_set_shows_the_lint_command_with_its_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_roboflow_coco(draw_truth({"train": 6, "val": 2}), tmp_path / "export")
    (tmp_path / "export/train/pic 001.jpg").unlink()
    assert shard("build", tmp_path / "export", tmp_path / "out", "--drop-unused", "--merge", "cell,dot=a b") == 2
    error = capsys.readouterr().err
    assert f"`python -m jobs.lint {tmp_path / 'export'} --merge 'cell,dot=a b' --drop-unused` shows all" in error
    assert "missing image files (1): pic 001.jpg" in error
    assert not (tmp_path / "out").exists()

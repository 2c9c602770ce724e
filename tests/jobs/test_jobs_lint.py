"""`python -m jobs.lint`: what it prints and its exit codes."""

import re
from pathlib import Path

import pytest
from support.data import contents, edit, noise_image, with_orientation, write_coco
from support.exif import write_scenes
from support.layouts import draw_scene, draw_truth, write_roboflow_coco, write_roboflow_yolo
from support.paths import ROOT

from jobs.cli import main
from jobs.lint import build_parser, run
from pipeline.data.importing.drawn_export import write_export


def lint(*words: object) -> int:
    return main(build_parser(), run, [str(word) for word in words])


def test_data_that_can_be_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_coco(tmp_path)
    before = contents(tmp_path)
    assert lint(annotations, images) == 0
    seen = capsys.readouterr()
    assert seen.err == ""
    lines = seen.out.splitlines()
    assert lines[0].split() == ["count", "done", "to", "what"]
    assert lines[1].split()[:2] == ["11", "drop"]
    assert lines[2].strip() == (
        "annotation 3 of image 3, annotation 7 of image 10, annotation 11 of image 17, annotation 15 of image 31, "
        "annotation 19 of image 38, ..."
    )
    assert lines[-1] == "12 images, 3 categories: a build accepts them"
    assert contents(tmp_path) == before, "nothing is written"


def test_the_page_shows_what_lint_prints_of_the_drawn_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of smaller images, which have the same findings."""
    monkeypatch.chdir(tmp_path)
    write_export(Path("export.zip"), size=120)
    assert lint("export.zip") == 0
    page = (ROOT / "docs/own_data.md").read_text()
    (shown,) = re.findall(r"```\n( +count  done to what\n.*?)```", page, re.DOTALL)
    for line, printed in zip(shown.splitlines(), capsys.readouterr().out.splitlines(), strict=True):
        assert printed == line or (line.endswith(", ...") and printed.startswith(line.removesuffix("...")))


def test_faults_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_coco(tmp_path)
    (images / "some_3.jpg").unlink()
    (images / "some_10.jpg").write_text("x")
    assert lint(annotations, images) == 1
    out = capsys.readouterr().out
    assert "1  refuse  missing image files; supply them or remove their entries\n" + " " * 19 + "some_3.jpg\n" in out
    assert "12 images, 3 categories: a build refuses them, see the 2 lines marked `refuse`" in out
    assert lint(annotations) == 0
    assert "a build accepts them; give IMAGES to check the images as well" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.json",), "error: cannot read annotations nowhere.json: No such file"),
        (("instances.json", "--draw", "drawn"), "--draw needs IMAGES"),
        (("instances.json", "images", "--draw", "images"), "--draw images is not empty"),
        (
            ("instances.json", "images", "--draw", "instances.json"),
            "--draw instances.json is not empty or not a folder",
        ),
        (("instances.json", "pipe:cat x"), "commands are never run"),
    ],
)
def test_wrong_input_exits_2(
    here: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    write_coco(here)
    assert lint(*words) == 2
    assert message in capsys.readouterr().err


def test_lint_of_images_that_are_nowhere_prints_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_coco(tmp_path)
    assert lint(annotations, images / "nowhere.zip") == 1
    out = capsys.readouterr().out
    assert "sources of images that cannot be used" in out
    assert f"there is no image folder, zip or tar {images / 'nowhere.zip'}" in out
    assert "boxes without width or height" in out


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"file_name": "/home/me/x.jpg"}, "file names that are invalid or leave the image folder"),
        ({"id": "3"}, "ids that are not whole numbers"),
        ({"width": 416.0}, "images whose width and height are not valid"),
    ],
)
def test_lint_of_entries_that_are_all_refused_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, object], line: str
) -> None:
    annotations, images = write_coco(tmp_path)
    edit(annotations, {"images": [{"id": 3, "file_name": "some_3.jpg", "width": 64, "height": 48} | change]})
    assert lint(annotations, images) == 1
    seen = capsys.readouterr()
    assert seen.err == ""
    assert f"        1  refuse  {line}" in seen.out
    assert "0 images, 3 categories: a build refuses them" in seen.out


def test_lint_asks_for_the_orientation_and_draws_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = write_scenes(tmp_path, (1, 3), "displayed")
    assert lint(annotations, images) == 1
    out = capsys.readouterr().out
    assert "do the boxes lie on the images as viewers show them, or as stored? EXIF rotates 1 of orientation 3" in out
    assert f"python -m jobs.lint {annotations} {images} --draw FOLDER" in out
    assert lint(annotations, images, "--exif", "apply", "--draw", tmp_path / "drawn") == 0
    assert f"1 images in {tmp_path / 'drawn'}" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["000000000002.png"]
    assert lint(annotations, "--draw", tmp_path / "drawn") == 2
    assert "--draw needs IMAGES" in capsys.readouterr().err


def test_lint_of_a_data_set_prints_its_table_and_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_roboflow_coco(draw_truth({"train": 6, "val": 2}), tmp_path / "export")
    before = contents(tmp_path)
    assert lint(tmp_path / "export", "--drop-unused") == 0
    out = capsys.readouterr().out
    assert "1  keep    categories without a box in any split; dropped, as --drop-unused asks" in out
    assert "train 6, val 2 images, 3 classes: a build accepts them" in out
    assert contents(tmp_path) == before, "nothing is written"
    (tmp_path / "export/valid/pic 007.jpg").write_bytes((tmp_path / "export/train/pic 001.jpg").read_bytes())
    assert lint(tmp_path / "export") == 1
    out = capsys.readouterr().out
    assert "valid/pic 007.jpg and train/pic 001.jpg" in out
    assert "a build refuses them, see the 1 lines marked `refuse`" in out


def test_lint_of_a_data_set_draws_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_roboflow_yolo({"train": [draw_scene("a.jpg", 1)], "val": [draw_scene("b.jpg", 2)]}, tmp_path / "export")
    for name in ("train/images/a.jpg", "valid/images/b.jpg"):
        (tmp_path / "export" / name).write_bytes(with_orientation(noise_image((50, 50), 1), 3))
    assert lint(tmp_path / "export") == 1
    assert f"python -m jobs.lint {tmp_path / 'export'} --draw FOLDER" in capsys.readouterr().out
    assert lint(tmp_path / "export", "--exif", "apply", "--draw", tmp_path / "drawn") == 0
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_lint_of_a_path_that_cannot_be_read_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as one without permission, which tests of root do not meet."""
    assert lint(tmp_path / ("x" * 300)) == 2
    assert "File name too long" in capsys.readouterr().err

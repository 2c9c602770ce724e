"""`jobs.predict` over many images: outputs, a stop in the middle, unreadable images, and wrong requests."""

import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.data import pack
from support.helpers import tiny_checkpoint, write_image
from support.paths import ROOT

from jobs import cli, predict
from pipeline.evaluation.drawing import is_drawing
from pipeline.files.atomic import temporary_name
from pipeline.inference import prediction_parts
from pipeline.inference.predict_images import PredictImages
from pipeline.inference.prediction_parts import PartFolder, Row

IMAGES = 7
KILLED = """
import os, signal, sys
from jobs import cli, predict
from pipeline.inference import prediction_parts
from pipeline.inference.predict_images import PredictImages
prediction_parts.PART_IMAGES = 2
detect = PredictImages._detect
def die(self, item, *found):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return detect(self, item, *found)
PredictImages._detect = die
cli.main(predict.build_parser(), predict.run, sys.argv[1:])
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and `images`."""
    project = tmp_path_factory.mktemp("project")
    tiny_checkpoint(project)
    (project / "images").mkdir()
    for number in range(IMAGES):
        write_image(project / "images" / f"{number + 10}.jpg", (60 + 10 * number, 80), seed=number)
    return project


@pytest.fixture(autouse=True)
def _inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(prediction_parts, "PART_IMAGES", 2)


def call(*argv: object) -> int:
    words = ["checkpoint", *map(str, argv), "--threshold", "0", "--top-k", "3"]
    return cli.main(predict.build_parser(), predict.run, words)


def detections(out: Path) -> list[tuple[object, ...]]:
    rows = json.loads(out.read_text())
    return [(row["image_id"], row["category_id"], row["bbox"], row["score"]) for row in rows]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that went through the model."""
    names: list[str] = []
    detect = PredictImages._detect

    def note(self: PredictImages, item: int, *found: object) -> Row:
        names.append(self.images[item].source.name)
        return detect(self, item, *found)  # type: ignore[arg-type]

    monkeypatch.setattr(PredictImages, "_detect", note)
    return names


def test_predict_folder_and_zip_give_the_same_detections(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack(project / "images", tmp_path / "images.zip", "data/", zipfile.ZIP_DEFLATED)
    for source, name in (("images", "a.json"), (archive, "b.json")):
        assert call(source, "--out", tmp_path / name, "scaling.num_workers=0") == 0
        assert f"{name}: {3 * IMAGES} detections in {IMAGES} images" in capsys.readouterr().out
    assert detections(tmp_path / "a.json") == detections(tmp_path / "b.json")
    assert {row[0] for row in detections(tmp_path / "a.json")} == set(range(10, 10 + IMAGES))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.images.json",
        "a.json",
        "b.images.json",
        "b.json",
        "images.zip",
    ]


def test_predict_stopped_continues_without_a_repeated_or_lost_image(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    assert call("images", "--out", out) == 0
    expected = out.read_bytes()
    computed.clear()
    noted = PredictImages._detect

    def stop(self: PredictImages, item: int, *found: object) -> Row:
        if len(computed) == 5:
            raise KeyboardInterrupt
        return noted(self, item, *found)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(PredictImages, "_detect", stop)
        assert call("images", "--out", out) == 130
    assert f"4 of {IMAGES} images are kept" in capsys.readouterr().err
    assert out.read_bytes() == expected, "the old file stays until the new one is whole"
    out.unlink()
    assert call("images", "--out", out) == 0
    assert out.read_bytes() == expected
    assert len(computed) == 5 + IMAGES - 4, "only the image of the incomplete part is computed twice"
    assert not (tmp_path / "found.json.parts").exists()


@pytest.mark.slow
def test_predict_killed_continues_without_a_repeated_or_lost_image(tmp_path: Path, computed: list[str]) -> None:
    expected, out = tmp_path / "expected.json", tmp_path / "found.json"
    assert call("images", "--out", expected) == 0
    computed.clear()
    words = ["checkpoint", "images", "--out", str(out), "--threshold", "0", "--top-k", "3"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{KILLED}"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert call("images", "--out", out) == 0
    assert len(computed) == IMAGES - 4
    assert out.read_bytes() == expected.read_bytes()


def test_predict_removes_what_killed_processes_left_and_no_other_file(tmp_path: Path) -> None:
    left = [temporary_name(name) for name in ("found.json", "found.images.json", "10.png")]
    for name in (*left, temporary_name("other.json")):
        (tmp_path / name).touch()
    assert call("images", "--out", tmp_path / "found.json", "--draw", tmp_path) == 0
    there = {path.name for path in tmp_path.iterdir()}
    assert not there & {*left}
    assert len(there) == IMAGES + 3


def test_predict_stopped_while_it_writes_says_how_to_continue(
    tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.launch.prediction.write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("images", "--out", out) == 130
    assert f"{IMAGES} of {IMAGES} images are kept in {out}.parts; the same command" in capsys.readouterr().err
    assert call("images", "--out", out) == 0
    assert len(computed) == IMAGES


def test_predict_stopped_after_it_has_written_says_of_no_image_that_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    remove = PartFolder.remove

    def remove_and_stop(parts: PartFolder) -> None:
        remove(parts)
        raise KeyboardInterrupt

    monkeypatch.setattr(PartFolder, "remove", remove_and_stop)
    assert call("images", "--out", tmp_path / "found.json") == 130
    assert "kept" not in capsys.readouterr().err
    assert (tmp_path / "found.json").exists()


@pytest.mark.parametrize("change", [["--exif", "ignore"], ["scaling.cpus_per_worker=2"]])
def test_predict_other_request_uses_no_old_part(
    change: list[str], tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.launch.prediction.write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call("images", "--out", out) == 130
    assert len(computed) == IMAGES
    assert call("images", "--out", out, *change) == 0
    assert len(computed) == 2 * IMAGES


def test_predict_unreadable_images_are_listed_and_the_others_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("images/10.jpg\nabsent.jpg\nbad.png\nimages/11.jpg\n")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert call(tmp_path / "list.txt", "--out", tmp_path / "found.parquet", "--draw", tmp_path / "drawn") == 1
    captured = capsys.readouterr()
    assert "6 detections in 2 images" in captured.out
    assert "2 of 4 images could not be read" in captured.err
    assert "absent.jpg: cannot be read" in captured.err
    assert "bad.png: has a broken png header" in captured.err
    listed = json.loads((tmp_path / "found.images.json").read_text())
    assert (len(listed["images"]), len(listed["unreadable"])) == (2, 2)
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["10.png", "11.png"]


def test_predict_draws_any_number_of_images_as_jpeg(tmp_path: Path) -> None:
    for _ in range(2):  # the second call replaces the drawings of the first
        assert call("images/1?.jpg", "--draw", tmp_path, "--draw-as", "jpg") == 0
        drawn = sorted(tmp_path.iterdir())
        assert [path.name for path in drawn] == [f"{number + 10}.jpg" for number in range(IMAGES)]
        assert all(is_drawing(path) for path in drawn)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["images"], "--out FILE.json"),
        (["absent", "--out", "x.json"], "absent"),
        (["images", "--out", "x.json", "--json"], "--json"),
        (["images", "--out", "x.json", "scaling.min_workers=1"], "scaling.num_workers"),
        (["images", "--out", "x.json", "scaling.num_workers=-1"], "scaling.num_workers"),
        (["scaling.num_workers=1"], "give images"),
        (["images", "--out", "a", "--draw", "b"], "two folders"),
        (["images", "--draw", "images/drawn"], "choose a folder outside"),
        (["images", "--draw", "images/10.jpg"], "not a folder"),
        (["images/10.jpg", "--out", "checkpoint/state.json"], "checkpoint"),
        (["images", "--out", "x.json", "--exif", "apply", "--top-k", "0"], "top_k 0"),
    ],
)
def test_predict_wrong_request_exits_2_and_writes_nothing(
    argv: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(project.rglob("*"))
    words = ["checkpoint", *argv]
    assert cli.main(predict.build_parser(), predict.run, words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert sorted(project.rglob("*")) == before

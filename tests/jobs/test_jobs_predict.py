"""`jobs.register` and `jobs.predict` from the command line: from a run to drawn boxes, and clear errors."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.data import with_orientation
from support.helpers import tiny_config, tiny_run, write_image

from jobs import cli, predict, register
from pipeline.inference.predictor import read_image
from pipeline.runs.record import write_run
from pipeline.tracking.client import connect


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a run `runs/tiny` and its MLflow store."""
    folder = tmp_path_factory.mktemp("project")
    config = tiny_config(tracking={"uri": f"sqlite:///{folder}/runs/mlflow.db", "register_as": "tiny-detector"})
    connect(config.tracking.uri, create=True)
    write_run(tiny_run(folder / "runs" / "tiny", config))
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def call(job: object, *argv: object) -> int:
    return cli.main(job.build_parser(), job.run, [str(word) for word in argv])  # type: ignore[attr-defined]


def test_predict_run_and_registered_model_draw_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(register, "tiny") == 0
    assert capsys.readouterr().out == "models:/tiny-detector/1 = models:/tiny-detector@challenger\n"
    assert call(register, "runs/tiny", "--alias", "champion") == 0
    assert "models:/tiny-detector/1 =" in capsys.readouterr().out

    first = write_image(tmp_path / "street.jpg")
    (tmp_path / "other").mkdir()
    second = write_image(tmp_path / "other" / "street.png", (60, 200))
    out = tmp_path / "out"
    command = ("models:/tiny-detector@champion", first, second, "--out", out, "--threshold", 0, "--top-k", 3)
    assert call(predict, *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (1 + 3)
    assert str(out / "street.png") in lines[0]
    assert read_image(out / "street.png").size == (600, 450)
    assert read_image(out / "street-2.png").size == (180, 600)

    assert call(predict, *command, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(first), str(second)]
    assert call(predict, "tiny", first, *command[3:], "--json") == 0  # the run itself gives the same
    assert json.loads(capsys.readouterr().out) == rows[0]


def test_predict_shows_every_format_that_it_writes_results_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Image.open(write_image(tmp_path / "a.png")) as image:
        files = [tmp_path / name for name in ("a.png", "b.webp", "c.bmp", "d.tiff")]
        for path in files[1:]:
            image.save(path, lossless=True)
    assert call(predict, "tiny", *files, "--out", tmp_path / "out", "--threshold", 0, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == list(map(str, files))
    assert all(row["boxes"] == rows[0]["boxes"] for row in rows)


def test_predict_into_the_folder_of_its_inputs_replaces_only_own_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tiny_run(tmp_path / "run").checkpoint
    photos = [
        write_image(tmp_path / name, (100, 80)) for name in ("photo.png", "street.jpg", "street.png", "other.jpg")
    ]
    before = {path: path.read_bytes() for path in photos}
    command = (checkpoint, "photo.png", "street.jpg", "other.jpg", "--out", ".", "--json")
    drawn = []
    for _ in range(2):  # the second call replaces the drawings of the first
        assert call(predict, *command) == 0
        drawn.append([json.loads(line)["drawn"] for line in capsys.readouterr().out.splitlines()])
    assert drawn == [["photo-2.png", "street-2.png", "other.png"]] * 2
    assert {path: path.read_bytes() for path in photos} == before
    assert len(list(tmp_path.glob("*.*"))) == len(photos) + 3
    photos[0].write_bytes(with_orientation(read_image(photos[0]), 6, "PNG"))
    for exif, size in (("apply", (480, 600)), ("ignore", (600, 480))):
        assert call(predict, checkpoint, "photo.png", "--out", ".", "--json", "--exif", exif) == 0
        assert read_image(json.loads(capsys.readouterr().out)["drawn"]).size == size
    assert call(predict, checkpoint, "other.png", "--out", ".", "--json") == 0  # a drawing that is an input stays
    assert json.loads(capsys.readouterr().out)["drawn"] == "other-2.png"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("tiny", "absent.jpg"), "cannot read image absent.jpg"),
        (("tiny", "text.jpg"), "text.jpg is neither JPEG nor PNG"),
        (("tiny", "good.jpg", "--threshold", "7"), "threshold 7.0 must lie in"),
        (("tiny", "good.jpg", "--out", "good.jpg"), "choose another --out"),
        (("no-such-run", "good.jpg"), "runs in runs: tiny"),
        (("models:/tiny-detector", "good.jpg"), "models:/NAME@ALIAS"),
        (("models:/absent@champion", "good.jpg"), "there is no registered model 'absent'"),
        (("models:/absent@champion", "good.jpg", "--tracking-uri", "sqlite:///none.db"), "no MLflow database"),
        (("models:/absent@champion", "good.jpg", "--tracking-uri", "http://127.0.0.1:9"), "does not answer"),
        (("models:/absent@champion", "good.jpg", "--tracking-uri", "mlruns"), "--tracking-uri"),
    ],
)
def test_predict_bad_arguments_exit_2(
    folder: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.jpg").write_text("hello")
    write_image(folder / "good.jpg")
    before = sorted(folder.rglob("*"))
    assert call(predict, *argv) == (1 if "does not answer" in message else 2)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert [path for path in sorted(folder.rglob("*")) if path not in before] == []


def test_predict_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for job in (predict, register):
        with pytest.raises(SystemExit) as stop:
            call(job, "--help")
        assert stop.value.code == 0
        assert "example:\n  python -m jobs." in capsys.readouterr().out

"""The rows of a process: those of the detector on each image alone, in any order, and faults as rows."""

from pathlib import Path

import pytest
from support.helpers import tiny_checkpoint, write_image

from pipeline.checkpoint import load_inference
from pipeline.config import ScalingConfig
from pipeline.errors import InputError, StorageError
from pipeline.evaluation.drawing import is_drawing
from pipeline.inference.image_sources import list_images
from pipeline.inference.predict_images import BuildPrediction, ImageWork, PredictImages, make_options
from pipeline.inference.predictor import Predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, one of them damaged."""
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(120, 90), (90, 120), (64, 64), (120, 90), (200, 50)]):
        write_image(folder / f"{number}.jpg", size, seed=number)
    (folder / "5.jpg").write_text("damaged")
    return folder


def build(folder: Path, checkpoint: Path, drawings: Path | None = None) -> PredictImages:
    inference = load_inference(checkpoint)
    inference.config.__dict__["scaling"] = ScalingConfig(use_gpu=False)
    images = list_images([str(folder)])
    work = tuple(ImageWork(image, drawings and drawings / f"{k}.jpg") for k, image in enumerate(images))
    return BuildPrediction.of(inference, work, make_options(0, 3, "apply"))()


def test_predict_images_rows_have_the_bits_of_the_detector_in_any_order(folder: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    predict = build(folder, checkpoint)
    rows = [*predict(range(3)), *predict(range(3, 6))]
    again = build(folder, checkpoint)
    assert [*again(range(4, 6)), *again(range(4))] == [*rows[4:], *rows[:4]]
    detector = Predictor(load_inference(checkpoint), "cpu")
    for number, row in enumerate(rows[:5]):
        found = detector(folder / f"{number}.jpg", threshold=0, top_k=3)
        assert row == {"size": list(found.size), **found.to_dict()}
        assert len(found) == 3
    assert "neither JPEG nor PNG" in rows[5]["fault"]


def test_predict_images_draws_what_can_be_read(folder: Path, tmp_path: Path) -> None:
    list(build(folder, tiny_checkpoint(tmp_path), tmp_path / "drawn")(range(6)))
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == [f"{number}.jpg" for number in range(5)]
    assert all(is_drawing(path) for path in drawn)
    assert not is_drawing(folder / "0.jpg")


def test_predict_images_drawing_that_cannot_be_written_raises(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="--draw"):
        next(build(folder, tiny_checkpoint(tmp_path), tmp_path / "file")(range(1)))


@pytest.mark.parametrize("limits", [(-0.1, 1, "apply"), (0.5, 0, "apply"), (0.5, 1, "turn")])
def test_make_options_out_of_bounds_raises(limits: tuple[float, int, str]) -> None:
    with pytest.raises(InputError):
        make_options(*limits)  # type: ignore[arg-type]

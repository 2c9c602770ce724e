"""Predictions equal those of the evaluation, have class names, and are drawn."""

import copy
import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.data import with_orientation
from support.helpers import NAMES, tiny_checkpoint, tiny_config, write_image
from support.model import small_detr

from pipeline.checkpoint import Inference, load_inference
from pipeline.data.batch import MEAN, STD
from pipeline.data.index import Category
from pipeline.errors import DetectionError, InputError
from pipeline.evaluation.drawing import Prediction, class_colour, draw_detections
from pipeline.inference.predictor import Predictor, read_image
from pipeline.model.postprocess import postprocess


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Inference:
    return load_inference(tiny_checkpoint(tmp_path_factory.mktemp("predictor")))


@pytest.fixture(scope="module")
def predictor(inference: Inference) -> Predictor:
    return Predictor(inference, "cpu")


def test_predict_equals_the_model_on_the_resized_image(
    inference: Inference, predictor: Predictor, tmp_path: Path
) -> None:
    image = Image.open(write_image(tmp_path / "a.png"))  # 120 x 90 -> the shortest side 96, the longest at most 128
    pixels = np.array(image.resize((128, 96), Image.Resampling.BILINEAR))
    tensor = (
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - torch.tensor(MEAN).view(3, 1, 1)
    ) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        outputs = inference.model(tensor[None], torch.zeros(1, 96, 128, dtype=torch.bool))
    (expected,) = postprocess(outputs, torch.tensor([[90, 120]]))
    (found,) = predictor.predict([image], threshold=0.0, top_k=100)
    left, top, right, bottom = expected["boxes_xyxy"].T
    torch.testing.assert_close(torch.tensor(found["scores"]), expected["scores"])
    torch.testing.assert_close(torch.tensor(found["boxes"]), torch.stack([left, top, right - left, bottom - top], 1))
    assert found["labels"] == [NAMES[k] for k in expected["labels"]]
    assert found["category_ids"] == [10 * (int(k) + 1) for k in expected["labels"]]


def test_bytes_path_and_opened_image_are_one_image_each(predictor: Predictor, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    alone = predictor.predict([path], 0.0)[0]
    same = predictor.predict(
        [str(path), path.read_bytes(), Image.open(path), write_image(tmp_path / "b.png", (40, 200))], 0.0
    )
    assert same[:3] == [alone] * 3
    assert predictor.predict([], 0.0) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_predict_orientation_gives_boxes_of_the_displayed_image(predictor: Predictor, orientation: int) -> None:
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 80, 3), np.uint8))
    file = with_orientation(stored, orientation, "PNG")
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    opened = Image.open(io.BytesIO(file))
    assert np.array_equal(read_image(file), shown)
    assert np.array_equal(read_image(file, "ignore"), stored)
    twice = read_image(read_image(opened))  # as `jobs.predict` draws what it has read
    assert np.array_equal(twice, shown)
    (expected,) = predictor.predict([np.array(shown)], 0.0, 5)
    assert predictor.predict([file, opened, shown, twice], 0.0, 5) == [expected] * 4
    (expected,) = predictor.predict([np.array(stored)], 0.0, 5)
    assert predictor.predict([file, read_image(opened, "ignore")], 0.0, 5, "ignore") == [expected] * 2
    assert predictor.predict([read_image(opened, "ignore")], 0.0, 5) == [expected]
    assert opened.getexif().get(0x0112) == orientation  # the caller's image is as it was


def test_predict_unknown_exif_is_refused(predictor: Predictor) -> None:
    with pytest.raises(InputError, match="exif"):
        predictor.predict([], exif="auto")  # type: ignore[arg-type]


def test_predict_threshold_and_top_k_limit_detections(predictor: Predictor, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg")
    (everything,) = predictor.predict([path], 0.0, 20)
    assert len(everything["scores"]) == 20
    assert everything["scores"] == sorted(everything["scores"], reverse=True)
    limit = everything["scores"][5]
    (some,) = predictor.predict([path], limit, 20)
    assert min(some["scores"]) >= limit
    assert some["scores"] == everything["scores"][: len(some["scores"])]
    (none,) = predictor.predict([path], 1.0)
    assert none == {"boxes": [], "scores": [], "labels": [], "category_ids": []}
    for threshold, top_k in ((-0.1, 1), (1.1, 1), (0.5, 0)):
        with pytest.raises(InputError, match="threshold"):
            predictor.predict([path], threshold, top_k)


def test_a_softmax_head_gives_one_label_per_query_best_first(tmp_path: Path) -> None:
    model = small_detr().model_dump(mode="json")
    config = tiny_config(model=model, loss={"classification": "softmax"})
    predictor = Predictor(load_inference(tiny_checkpoint(tmp_path, config=config)), "cpu")
    (found,) = predictor.predict([write_image(tmp_path / "a.jpg")], 0.0)
    assert len(found["scores"]) == config.model.queries
    assert found["scores"] == sorted(found["scores"], reverse=True)
    (some,) = predictor.predict([tmp_path / "a.jpg"], 0.0, top_k=3)
    assert some["scores"] == found["scores"][:3]


def test_predict_labels_without_category_are_left_out(inference: Inference, tmp_path: Path) -> None:
    config = inference.config
    raw = config.model_copy(update={"data": config.data.model_copy(update={"labels": "raw"})})
    with_gaps = replace(inference, config=raw, categories=(Category(1, "one"), Category(3, "three")))
    (found,) = Predictor(with_gaps, "cpu").predict([write_image(tmp_path / "a.jpg")], 0.0, 60)
    assert set(zip(found["labels"], found["category_ids"], strict=True)) == {("one", 1), ("three", 3)}
    assert len(found["boxes"]) == 2 * 12  # two of five labels for each query


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_predict_images_in_other_modes_become_rgb(predictor: Predictor, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 50), (200, 10, 10)).convert(mode).save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    found = predictor.predict([buffer.getvalue(), Image.new("RGB", (1, 1)).convert(mode)], 0.0, 5)
    assert [len(image["boxes"]) for image in found] == [5, 5]
    assert all(np.isfinite(image["boxes"]).all() for image in found)


@pytest.mark.parametrize("size", [(1, 1), (400, 3), (3, 400)])
def test_predict_images_of_any_shape(predictor: Predictor, size: tuple[int, int]) -> None:
    (found,) = predictor.predict([Image.new("RGB", size)], 0.0, 5)
    assert len(found["boxes"]) == 5
    assert np.isfinite(found["boxes"]).all()


def test_read_image_not_an_image_raises(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    whole = write_image(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("text.jpg", "half.jpg", "absent.jpg", "."):
        with pytest.raises(InputError, match=str(tmp_path / name)):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="the image"):
        read_image(b"")


def test_call_of_one_image_and_of_many(predictor: Predictor, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    (expected,) = predictor.predict([path], 0.0, 7)
    one = predictor(str(path), threshold=0, top_k=7)
    assert one.to_dict() == expected
    assert (one.size, one.boxes_xyxy.shape, one.boxes_xyxy.dtype) == ((90, 120), (7, 4), np.float32)
    assert (one.scores.dtype, one.category_ids.dtype) == (np.float32, np.int64)
    assert [category.name for category in predictor.categories] == list(NAMES)
    for many in ([path, path], (path, path), iter([path, path])):
        assert [found.to_dict() for found in predictor(many, threshold=0, top_k=7)] == [expected] * 2
    assert predictor([]) == []
    assert len(predictor(path, threshold=1)) == 0
    assert predictor(path, threshold=1).boxes_xyxy.shape == (0, 4)
    with pytest.raises(InputError, match="image 1: cannot read"):
        predictor([path, tmp_path / "absent.jpg"])
    with pytest.raises(InputError, match="NoneType"):
        predictor(None)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="top_k"):
        predictor([], top_k=0)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int64]
)
def test_read_image_of_a_tensor_has_the_pixels_of_its_array(dtype: torch.dtype) -> None:
    array = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3) // 3
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    scaled = (tensor.double() / 255).to(dtype) if dtype.is_floating_point else tensor.to(dtype)
    steps = np.abs(np.array(read_image(scaled)).astype(int) - array)
    assert steps.max() <= (dtype == torch.bfloat16)  # 8 bits of mantissa
    assert read_image(scaled.requires_grad_(dtype.is_floating_point)).size == (16, 16)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(20, 30, 3), "permute"),
        (torch.zeros(2, 3, 20, 30), "list"),
        (torch.zeros(20, 30), "shape"),
        (torch.zeros(3, 0, 30), "shape"),
        (torch.full((3, 20, 30), 255.0), "normalised"),
        (torch.full((3, 20, 30), -0.1), "normalised"),
        (torch.full((3, 20, 30), float("nan")), "nan"),
        (torch.full((3, 20, 30), 256), "255"),
        (torch.zeros(3, 20, 30, dtype=torch.bool), "bool"),
        (torch.zeros(3, 20, 30, dtype=torch.complex64), "complex"),
    ],
)
def test_read_image_other_tensors_are_refused(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_image(tensor)


@pytest.mark.parametrize("shape", [(2, 20, 30, 3), (3, 20, 30), (20, 30), (20, 30, 4)])
def test_read_image_other_arrays_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        read_image(np.zeros(shape, np.uint8))


def test_draw_detections_marks_boxes_and_keeps_large_images(tmp_path: Path) -> None:
    prediction = Prediction(
        boxes=[[10.0, 20.0, 30.0, 40.0], [-5.0, -5.0, 500.0, 500.0], [50.0, 50.0, 0.0, -1.0]],
        scores=[0.9, 0.5, 0.4],
        labels=["disc", "square of a very long name that does not fit", "ring"],
        category_ids=[1, 2, 3],
    )
    small = Image.new("RGB", (100, 80))
    drawn = draw_detections(small, prediction)
    scale = drawn.width // 100
    assert drawn.size == (100 * scale, 80 * scale)
    assert drawn.width >= 600
    assert drawn.getpixel((10 * scale + 1, 50 * scale)) == class_colour(1)
    assert small.getbbox() is None  # the original is untouched
    assert draw_detections(Image.new("L", (1000, 10)), prediction).size == (1000, 10)


def test_class_colour_differs_by_class() -> None:
    colours = [class_colour(k) for k in range(1, 91)]
    assert len(set(colours)) == 90
    neighbours = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in itertools.pairwise(colours)]
    assert min(neighbours) > 100


@pytest.mark.parametrize("bad", ["class_embed", "bbox_embed"])
def test_predict_weights_that_are_not_finite_raise(inference: Inference, bad: str) -> None:
    """NaN is below every threshold, so there would be no detections and no message."""
    model = copy.deepcopy(inference.model)
    for name, parameter in model.named_parameters():
        if bad in name:
            torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(DetectionError, match="not finite"):
        Predictor(replace(inference, model=model), "cpu")(Image.new("RGB", (60, 40)))

"""benchmarks.prediction: what is timed has the rows and the results file of `jobs.predict`."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.helpers import tiny_checkpoint, write_image

from benchmarks.prediction import BuildTimed, Sample, Save, Timed, build_parser, measure, run, sized_batches
from jobs import predict
from jobs.cli import main
from pipeline.checkpoint import load_inference
from pipeline.inference.image_sources import ImageSource, list_images
from pipeline.inference.predict_images import BuildPrediction, ImageWork, make_options
from pipeline.inference.predictor import read_image
from pipeline.model.weights.files import file_digest

IMAGES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    tiny_checkpoint(folder)
    (folder / "images").mkdir()
    for number in range(IMAGES):  # the last two have one size
        write_image(folder / "images" / f"{number}.jpg", (90 + 10 * min(number, 3), 80), seed=number)
    return folder


@pytest.fixture(scope="module")
def images(folder: Path) -> list[ImageSource]:
    return list_images([str(folder / "images")])


def build(folder: Path, images: list[ImageSource]) -> BuildPrediction:
    works = tuple(ImageWork(image) for image in images)
    return BuildPrediction.of(load_inference(folder / "checkpoint"), works, make_options(0.0, 100, "apply"))


def test_turns_have_the_rows_of_the_prediction_and_time_of_both(folder: Path, images: list[ImageSource]) -> None:
    made = build(folder, images)
    expected = [*made()(range(IMAGES))]
    rows, samples = zip(*BuildTimed(made, "turns")()(range(IMAGES)), strict=True)
    assert [*rows] == expected
    assert all(sample.alone > 0 and sample.whole > 0 for sample in samples)
    rows, samples = zip(*BuildTimed(made, "prediction")()(range(IMAGES)), strict=True)
    assert [*rows] == expected
    assert {sample.alone for sample in samples} == {0}


def test_sized_batches_have_the_size_of_each_image_and_are_shared(folder: Path, images: list[ImageSource]) -> None:
    work = build(folder, images)()
    batches = sized_batches(work)
    extents = [work.predictor.prepare(read_image(image.read())).extent for image in images]
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 3, *extent) for extent in extents]
    assert len({id(batch) for batch in batches}) == len({*extents}) == IMAGES - 1
    rows, samples = zip(*BuildTimed(build(folder, images), "model")()(range(IMAGES)), strict=True)
    assert [*rows] == [{}] * IMAGES
    assert all(sample.alone > 0 for sample in samples)


def test_measure_saves_the_file_of_the_command(folder: Path, images: list[ImageSource], tmp_path: Path) -> None:
    inference = load_inference(folder / "checkpoint")
    results = [*enumerate(BuildTimed(build(folder, images), "turns")()(range(IMAGES)))]
    found = measure(results, 0, images, Save(images, inference.categories))
    out = tmp_path / "found.json"
    words = [str(folder / "checkpoint"), str(folder / "images"), "--out", str(out), "--threshold", "0"]
    assert main(predict.build_parser(), predict.run, words) == 0
    assert found.digest == file_digest(out)
    samples = [sample for _, (_, sample) in results]
    assert found.alone == sum(sample.alone for sample in samples)
    assert found.whole > sum(sample.whole for sample in samples), "saving is part of a prediction"


def test_measure_counts_images_after_the_first_of_every_process(images: list[ImageSource]) -> None:
    def results() -> Iterator[tuple[int, Timed]]:
        for item, process in enumerate((1, 1, 1, 2, 1, 2)):
            if item > 3:
                time.sleep(0.05)
            yield item, ({}, Sample(process, 0.0, 1.0))

    found = measure(results(), 2, images, None)
    assert 0 < found.rate <= 2 / 0.1
    assert found.whole >= 6
    assert found.digest == ""


def test_prediction_in_one_process_is_a_row_with_both_shares(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.op=torch", "--images", "3", "--rounds", "1", "--workers"]
    assert main(build_parser(), run, words) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^\| one process \|( [\d.]+ \|){2} \d+% \|( [\d.e+]+ \|){2} \d+% \(\d+% to \d+%\) \|$", said, re.M
    )
    assert said.endswith("results files: the same bits\n")


def test_prediction_of_too_few_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, ["model.op=torch", "--images", "1", "--rounds", "1", "--workers"]) == 2
    assert "raise --images" in capsys.readouterr().err

"""The page of an analysis: every number is that of the analysis, any name is shown as text, nothing is requested."""

import dataclasses
import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.browser import foreign_addresses
from support.detections import planted_detections
from support.pages import tables_of
from support.paths import ASSETS

from pipeline.evaluation.analysis.analyse import analyse
from pipeline.evaluation.analysis.classes import summarise, table_of_classes
from pipeline.evaluation.analysis.files import write_analysis
from pipeline.evaluation.analysis.plots import shown_confusion
from pipeline.evaluation.analysis.result import Analysis, as_tree
from pipeline.evaluation.coco import ground_truth_of_file
from pipeline.evaluation.detections import from_results_json

SMALL = ASSETS / "coco_small"
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\u202eb", "שלום", "中文 🙂", "$x$ & 'y'"]
PLOTS = {"errors", "classes", "confusion", "thresholds", "sizes", "aspect_ratios"}


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return ground_truth_of_file(SMALL / "annotations.json")


@pytest.fixture(scope="module")
def analysis(truth: dict[str, Any]) -> Analysis:
    found = from_results_json(SMALL / "results.json")
    return analyse(truth, found, against=planted_detections(truth), queries=found, draws=20)


def read_image(image_id: int) -> Image.Image:
    return Image.new("RGB", (640, 480), (image_id % 255, 90, 90))


@pytest.fixture(scope="module")
def folder(analysis: Analysis, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_analysis(folder, analysis, "Analysis of results", [("Data", "coco_small")], read_image)
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "index.html").read_text("utf-8")


def test_write_analysis_writes_page_numbers_and_plots(folder: Path, analysis: Analysis, html: str) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "analysis.json", *(f"{name}.png" for name in PLOTS | {"queries", "differences"})}
    document = json.loads((folder / "analysis.json").read_text())
    assert document["metrics"] == json.loads(json.dumps(as_tree(analysis)))["metrics"]
    assert foreign_addresses(html) == []
    assert html.count("<svg") == len(PLOTS) + 2


def test_page_numbers_are_those_of_the_analysis(analysis: Analysis, html: str) -> None:
    tables = tables_of(html)
    classes = {row["class"]: row for row in tables["Classes, lowest AP first"]}
    assert len(classes) == len(analysis.categories)
    for each in analysis.categories:
        row = classes[each.name]
        assert row["AP"] == (each.ap.value if each.ap.value >= 0 else None)
        assert (row["objects"], row["images"], row["detections"]) == (each.objects, each.images, each.detections)
        assert (row["recall"], row["F1"]) == (each.best.recall, each.best.f1)
        assert row["threshold"] == (each.best.threshold if each.best.f1 else None)
    errors = {row["class"]: row for row in tables["Errors of each class by cause"]}
    assert all(errors[each.name][cause] == n for each in analysis.categories for cause, n in each.errors.items())
    assert analysis.comparison is not None
    for row in tables["The 12 COCO numbers of both models"]:
        difference = analysis.comparison.metrics[str(row["number"])]
        if difference.value >= 0:
            assert (row["this"], row["other"]) == (difference.value, difference.other)
            assert row["difference"] == difference.difference.value
    for caption, bins in (("AP by size", analysis.sizes), ("AP by aspect ratio", analysis.aspect_ratios)):
        assert [row["objects"] for row in tables[caption]] == [each.objects for each in bins]
        assert [row["AP"] for row in tables[caption]] == [each.ap if each.ap >= 0 else None for each in bins]


def test_page_confusions_add_up(analysis: Analysis, html: str) -> None:
    (caption,) = [caption for caption in tables_of(html) if "confusions" in caption]
    counts = analysis.confusion.counts
    off_diagonal = sum(map(sum, counts)) - sum(row[k] for k, row in enumerate(counts))
    rows = tables_of(html)[caption]
    assert sum(float(row["times"] or 0) for row in rows) == off_diagonal or len(rows) == 40
    assert [row["times"] for row in rows] == sorted((row["times"] for row in rows), key=lambda n: -float(n or 0))


def test_page_shows_each_image_once_with_its_errors(analysis: Analysis, html: str) -> None:
    assert analysis.comparison is not None
    pairs = len(analysis.comparison.gained) + len(analysis.comparison.lost)
    ids = {each.image_id for each in (*analysis.worst, *analysis.most_missed)}
    assert html.count('<img loading="lazy"') == len(ids) + pairs
    tables = tables_of(html)
    for each in analysis.worst:
        rows = tables[f"Errors of image {each.image_id}"]
        assert len(rows) == each.wrong + each.missed
        assert sum(row["error"] == "missed" for row in rows) == each.missed


def test_page_any_names_are_shown_as_text(truth: dict[str, Any], tmp_path: Path) -> None:
    names = iter(HOSTILE * len(truth["categories"]))
    hostile = {**truth, "categories": [{**each, "name": next(names)} for each in truth["categories"]]}
    analysis = analyse(hostile, planted_detections(hostile), draws=0)
    write_analysis(tmp_path, analysis, "<b>title</b>", [("<i>", "<u>")], read_image)
    html = (tmp_path / "index.html").read_text("utf-8")
    assert foreign_addresses(html) == []
    for tag in ("<script>alert", "<img src=x", "<b>", "<i>", "<u>"):
        assert tag not in html
    assert "\u202e" not in html
    shown = {unescape(str(row["class"])) for row in tables_of(html)["Classes, lowest AP first"]}
    assert shown == {name.replace("\u202e", "�") for name in HOSTILE[: len(shown)]}


def test_page_without_images_lists_them(analysis: Analysis, tmp_path: Path) -> None:
    write_analysis(tmp_path, analysis, "title", [], None)
    tables = tables_of((tmp_path / "index.html").read_text("utf-8"))
    assert [row["image"] for row in tables["Lowest F1"]] == [str(each.image_id) for each in analysis.worst]


def test_page_without_any_detection_or_object(truth: dict[str, Any], tmp_path: Path) -> None:
    nothing = planted_detections(truth, found=0.0)
    assert len(nothing) == 0
    for tree in (truth, {**truth, "annotations": []}):
        write_analysis(tmp_path, analyse(tree, nothing, draws=5), "empty", [], read_image)
        assert foreign_addresses((tmp_path / "index.html").read_text("utf-8")) == []


def test_page_of_many_classes_merges_those_that_do_not_occur(truth: dict[str, Any], tmp_path: Path) -> None:
    many = [{"id": 1000 + k, "name": f"class {k}"} for k in range(60)]
    tree = {**truth, "categories": [*truth["categories"], *many]}
    analysis = analyse(tree, planted_detections(truth), draws=0)
    write_analysis(tmp_path, analysis, "many", [], None)
    labels, counts = shown_confusion(analysis)
    assert labels == [*(each["name"] for each in truth["categories"]), "60 others", "background"]
    assert counts.sum() == sum(map(sum, analysis.confusion.counts))
    assert "60 others" in (tmp_path / "index.html").read_text("utf-8")
    assert table_of_classes(analysis, 20).endswith("and 45 more classes, 45 of them without objects")


def test_table_of_classes_says_how_many_more(analysis: Analysis) -> None:
    whole, cut = table_of_classes(analysis, 1000), table_of_classes(analysis, 3)
    assert len(whole.splitlines()) == 1 + len(analysis.categories)
    *lines, last = cut.splitlines()
    assert lines == whole.splitlines()[:4] or len(lines) == 4
    assert str(len(analysis.categories) - 3) in last


def test_table_of_classes_has_no_characters_that_move_the_cursor(truth: dict[str, Any]) -> None:
    hostile = {**truth, "categories": [{**each, "name": f"\x1b[2J{each['id']}\n"} for each in truth["categories"]]}
    table = table_of_classes(analyse(hostile, planted_detections(hostile), draws=0), 20)
    assert "\x1b" not in table
    assert len(table.splitlines()) == 1 + len(truth["categories"])


def test_summarise_names_ap_and_the_difference(analysis: Analysis) -> None:
    assert f"{analysis.metrics['AP'].value:.3f}" in summarise(analysis)
    assert analysis.comparison is not None
    assert f"{analysis.comparison.metrics['AP'].other:.3f}" in summarise(analysis)
    alone = summarise(dataclasses.replace(analysis, comparison=None))
    assert len(alone.splitlines()) == len(summarise(analysis).splitlines()) - 1

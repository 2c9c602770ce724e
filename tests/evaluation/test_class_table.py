"""Rows of classes: their numbers are those of pycocotools, the worst class is first."""

import json

import numpy as np
import pytest
from support.paths import ASSETS

from pipeline.evaluation.class_table import class_scores, class_table
from pipeline.evaluation.coco import Scores, coco_scores, ground_truth_of_file
from pipeline.evaluation.detections import from_results_json
from pipeline.evaluation.report import per_category_ap

SMALL = ASSETS / "coco_small"


@pytest.fixture(scope="module")
def scores() -> Scores:
    return coco_scores(ground_truth_of_file(SMALL / "annotations.json"), from_results_json(SMALL / "results.json"))


@pytest.fixture(scope="module")
def names() -> dict[int, str]:
    tree = json.loads((SMALL / "annotations.json").read_text())
    return {category["id"]: category["name"] for category in tree["categories"]}


def test_class_scores_are_worst_first_and_those_of_the_evaluation(scores: Scores, names: dict[int, str]) -> None:
    rows = class_scores(scores, names)
    known = [row for row in rows if row.AP >= 0]
    assert [row.AP for row in known] == sorted(row.AP for row in known)
    assert {row.id: row.AP for row in rows} == per_category_ap(scores)
    assert rows[: len(known)] == known, "classes without objects come last"
    assert all((row.objects > 0) == (row.AP >= 0) for row in rows)
    for key in ("AP", "AP50", "AP75", "AR100"):
        assert np.mean([getattr(row, key) for row in known]) == pytest.approx(scores.metrics[key], abs=1e-12)


def test_class_scores_count_objects_without_crowd_regions(scores: Scores, names: dict[int, str]) -> None:
    annotations = json.loads((SMALL / "annotations.json").read_text())["annotations"]
    for row in class_scores(scores, names):
        assert row.objects == sum(a["category_id"] == row.id and not a["iscrowd"] for a in annotations)


def test_class_table_has_a_line_per_class(scores: Scores, names: dict[int, str]) -> None:
    rows = class_scores(scores, names)
    head, *lines = class_table(rows).splitlines()
    assert head.split() == ["class", "id", "objects", "AP", "AP50", "AP75", "AR100"]
    assert len(lines) == len(rows)
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert [line.split()[-1] == "-" for line in lines] == [row.AP < 0 for row in rows]
    assert class_table([]).split()[0] == "class"


def test_class_table_hostile_name_stays_in_its_line_and_moves_no_cursor(scores: Scores, names: dict[int, str]) -> None:
    first, *others = sorted(names)
    shown = class_table(class_scores(scores, names | {first: "two\nlines \x1b[31m\u202e", others[0]: ""}))
    assert len(shown.splitlines()) == len(names) + 1
    assert shown.replace("\n", "").isprintable()
    assert "two lines" in shown

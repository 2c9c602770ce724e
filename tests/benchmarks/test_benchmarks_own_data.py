"""`benchmarks.own_data`: the drawn sets are what they are called, rows differ in one thing, results stand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import own_data
from benchmarks.miniature.training import Outcome
from benchmarks.own_data import ROWS, config_of
from benchmarks.own_data_sets import RARE_IMAGES, SETS, DataSet, keep_classes, make_rare
from benchmarks.own_data_table import BEGIN, END, QUESTIONS, TITLES, table_lines, update_page
from pipeline.config import flatten
from pipeline.data.dataset import DetectionDataset
from pipeline.errors import RunError

TINY = DataSet("tiny", 20, 4, ("disc", "square", "ring"), other_domain=True, rare=("ring",))


def test_make_rare_keeps_few_images_of_each_rare_class() -> None:
    tree: dict[str, Any] = {"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}]}
    drawn = np.random.default_rng(0).random((400, 3)) < 0.4
    tree["images"] = [{"id": k} for k in range(400)]
    tree["annotations"] = [{"image_id": int(k), "category_id": int(c) + 1} for k, c in np.argwhere(drawn)]
    rare = make_rare(tree, ("b", "c"), 80)
    assert len(rare["images"]) == 80
    for category in (2, 3):
        assert len({each["image_id"] for each in rare["annotations"] if each["category_id"] == category}) == RARE_IMAGES
    assert make_rare(tree, (), 10)["images"] == tree["images"][:10]
    assert {each["category_id"] for each in keep_classes(tree, ("a", "c"))["annotations"]} == {1, 3}


def test_draw_gives_the_same_data_twice_and_other_domain_is_grey(tmp_path: Path) -> None:
    digests = TINY.draw(tmp_path / "a")
    assert TINY.draw(tmp_path / "a") == digests
    assert TINY.draw(tmp_path / "b") == digests
    pixels = np.asarray(DetectionDataset(str(tmp_path / "a" / "train")).sample(1).image).astype(int)
    assert np.abs(pixels - pixels.mean(axis=-1, keepdims=True)).max() <= 1
    assert pixels.min() >= 40
    assert pixels.max() <= 215


def test_rows_differ_in_one_thing_and_have_about_the_same_steps(tmp_path: Path) -> None:
    drawn = DataSet("tiny", 20, 4, ("disc", "square", "ring"), other_domain=False)
    drawn.draw(tmp_path)
    configs = {row.name: config_of(row, drawn, 0, tmp_path, tmp_path / "weights") for row in ROWS}
    plain = flatten(configs["published"])
    for row in ROWS:
        changed = {key for key, value in flatten(configs[row.name]).items() if value != plain[key]}
        expected = {*row.settings, *(() if row.fine_tuned else ("model.init_from",))}
        assert changed - {"train.epochs", "optim.drop_epochs"} == expected
        samples = configs[row.name].train.epochs * (20 if not row.settings.get("data.balance") else 23)
        assert abs(samples / (own_data.STEPS * row.times * 8) - 1) < 0.15


def test_run_unit_that_stands_is_skipped_and_a_changed_one_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(own_data, "SETS", {"tiny": TINY})
    trained = []

    def train(config: Any, say: Any, finish: Any) -> Outcome:
        trained.append(config)
        return Outcome([{"epoch": 1.0, "AP": 0.5, "AP50": 0.7}], 1.0, 2.0, 3)

    monkeypatch.setattr(own_data, "train_and_evaluate", train)
    nothing = next(row for row in ROWS if row.name == "nothing")
    for seed in (0, 0, 1):
        own_data.run_unit(nothing, "tiny", seed, tmp_path, tmp_path / "results", tmp_path / "weights", "abc")
    assert [config.seed for config in trained] == [0, 1]
    recorded = json.loads((tmp_path / "results" / "tiny-nothing-seed0.json").read_text())
    assert (recorded["set"], recorded["row"], recorded["seed"], recorded["AP"]) == ("tiny", "nothing", 0, 0.5)
    monkeypatch.setattr(own_data, "STEPS", 100)
    own_data.run_unit(nothing, "tiny", 0, tmp_path, tmp_path / "results", tmp_path / "weights", "abc")
    assert len(trained) == 3
    assert "train.epochs" in capsys.readouterr().out


def results(*seeds: int) -> list[dict[str, Any]]:
    return [
        {"set": name, "row": row, "seed": seed, "AP": 0.1 * place + 0.01 * seed, "AP50": 0.5, "AP_rare": 0.2 * place}
        for name in SETS
        for place, row in enumerate(TITLES)
        for seed in seeds
    ]


def test_table_lines_pair_the_seeds_and_name_what_is_missing() -> None:
    lines = table_lines(results(0, 1, 2))
    assert len([line for line in lines if line.startswith("| few images | fine-tuned")]) == 8
    balance = next(line for line in lines if line.startswith("| balance | rare classes"))
    assert balance.count("+0.300") == 4, "three seeds and their mean"
    assert not any("Not measured" in line for line in lines)
    nearly = [{**each, "AP": 0.5 - (1e-4 if each["row"] == "published" else 0)} for each in results(0)]
    assert "-0.000" not in "".join(table_lines(nearly)), "zero has no sign of its own"
    some = [each for each in results(0) if each["row"] != "nothing"]
    lines = table_lines(some)
    assert lines[-1] == "Not measured yet: nothing of rare, nothing of few."
    assert not any(line.startswith("| start weights") for line in lines)
    assert {question.name for question in QUESTIONS} == set(SETS)
    assert table_lines([]) == ["Not measured yet."]


def test_update_page_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    update_page(results(0), page)
    first = page.read_text()
    assert first.startswith(f"before\n{BEGIN}\n| Data ")
    assert first.endswith(f"\n{END}\nafter\n")
    assert "old" not in first
    update_page(results(0), page)
    assert page.read_text() == first
    page.write_text("no marks")
    with pytest.raises(RunError, match=BEGIN):
        update_page(results(0), page)

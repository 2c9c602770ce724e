"""The ledger: what is read is what was written, and another space or damaged file is refused."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import AXES, Play, make_space

from pipeline.errors import RunError
from tune.search.ledger import (
    FILE,
    Report,
    check_same_space,
    format_ledger,
    new_ledger,
    parse_ledger,
    read_ledger,
    read_report,
    space_of,
    write_ledger,
)
from tune.settings import Domain
from tune.space import VARIANT, Axis, Space

VALUES = {"optim.lr": 2e-4, "optim.drop_epochs": [2]}
DATA = {"train": "abc", "val": "def"}


def change(space: Space, section: str, **values: Any) -> Space:
    base = space.base.model_copy(update={section: getattr(space.base, section).model_copy(update=values)})
    return replace(space, base=base)


def test_ledger_is_read_as_it_was_written(tmp_path: Path) -> None:
    ledger = Play(make_space({"samples": 3, "repeats": 2})).finish()
    write_ledger(str(tmp_path), ledger)
    assert read_ledger(str(tmp_path)) == ledger
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_read_ledger_without_file_returns_none(tmp_path: Path) -> None:
    assert read_ledger(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 2, "trials": [], "reports": []}'])
def test_read_ledger_damaged_or_of_another_version_raises(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RunError, match=FILE):
        read_ledger(str(tmp_path))


@pytest.mark.parametrize(
    ("place", "values", "text"),
    [
        ("trials", {"status": "again"}, "trials.0.status: Input should be 'waiting'"),
        ("trials", {"values": {"optim.lr": 1e-4}}, "the values of trial sweep-000 are not those of the space"),
        ("trials", {"colour": 1}, "unexpected keyword argument 'colour'"),
        (
            "trials",
            {"values": VALUES | {"optim.lr": 5}},
            "optim.lr of trial sweep-000 is 5, which the space does not have",
        ),
        ("trials", {"values": VALUES | {"optim.drop_epochs": [7]}}, "optim.drop_epochs of trial sweep-000 is [7]"),
        ("trials", {"takes": "other"}, "there is no trial other"),
        ("trials", {"name": "other"}, "there is no trial sweep-000"),
        ("reports", {"epoch": "first"}, "reports.0.epoch: Input should be a valid integer"),
        ("reports", {"score": math.nan}, "reports.0.score: Input should be a finite number"),
        ("axes", {"bundles": "x"}, "Input should be a valid dictionary"),
        ("axes", {"loguniform": [1, 2]}, "which the space does not have"),
    ],
)
def test_read_ledger_edited_by_hand_names_the_fault(
    tmp_path: Path, place: str, values: dict[str, Any], text: str
) -> None:
    document = json.loads(format_ledger(Play(make_space({"samples": 1})).finish()))
    document[place][0] |= values
    (tmp_path / FILE).write_text(json.dumps(document))
    with pytest.raises(RunError, match=re.escape(text)) as caught:
        read_ledger(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        ("config", {}, "('name' is missing)"),
        ("config.storage", None, "config: None is no text"),
        ("config.tracking", {}, "('uri' is missing)"),
        ("config.tracking", "x", FILE),
        ("config.tracking.uri", 3, "config: 3 is no text"),
        ("seconds", math.inf, "seconds: Input should be a finite number"),
        ("version", 2, "version 2 instead of 1"),
    ],
)
def test_read_ledger_with_an_emptied_or_wrong_part_raises(tmp_path: Path, place: str, value: Any, text: str) -> None:
    document = json.loads(format_ledger(Play(make_space({"samples": 1})).finish()))
    *parents, leaf = place.split(".")
    part = document
    for parent in parents:
        part = part[parent]
    part[leaf] = value
    (tmp_path / FILE).write_text(json.dumps(document))
    with pytest.raises(RunError, match=re.escape(text)) as caught:
        read_ledger(str(tmp_path))
    assert "use the code that wrote it, or start a new sweep with name=" in str(caught.value)


@pytest.mark.parametrize("key", ["version", "config", "search", "axes", "trials", "reports", "exchanges"])
def test_read_ledger_with_a_key_removed_names_it(tmp_path: Path, key: str) -> None:
    document = json.loads(format_ledger(Play(make_space({"samples": 1})).finish()))
    del document[key]
    (tmp_path / FILE).write_text(json.dumps(document))
    with pytest.raises(RunError, match=f"'{key}'"):
        read_ledger(str(tmp_path))


def test_check_same_space_accepts_longer_budgets_and_other_resources() -> None:
    space = make_space({"samples": 3})
    ledger = new_ledger(space, DATA)
    longer = make_space({"samples": 9, "epochs": 99, "minutes": 5, "concurrent": 2, "trial_failures": 0})
    check_same_space(ledger, longer, DATA, "runs/sweep")
    check_same_space(ledger, change(space, "scaling", num_workers=4), DATA, "runs/sweep")


@pytest.mark.parametrize(
    ("space", "data", "key"),
    [
        (make_space({"seed": 1}), DATA, "search.seed was 0, is 1"),
        (make_space({"sampler": "tpe"}), DATA, "search.sampler"),
        (make_space({"scheduler": "none"}), DATA, "search.scheduler was asha, is none"),
        (make_space({"points": [{"optim.lr": 2e-4}]}), DATA, "search.points"),
        (make_space({}, {**AXES, "optim.lr": {"loguniform": (1e-4, 2e-3)}}), DATA, "space.optim.lr differs"),
        (make_space({}, {"optim.lr": AXES["optim.lr"]}), DATA, "space.optim.drop_epochs differs"),
        (make_space({}, dict(reversed(AXES.items()))), DATA, "in the order optim.lr; optim.drop_epochs"),
        (make_space({}, epochs=5), DATA, "train.epochs was 4, is 5"),
        (change(make_space({}), "optim", clip=1.0), DATA, "optim.clip was 0.1, is 1.0"),
        (change(make_space({}), "data", window=7), DATA, "data.window"),
        (make_space({}), {**DATA, "val": "other"}, "data.val has other shards"),
    ],
)
def test_check_same_space_other_space_raises(space: Space, data: dict[str, str], key: str) -> None:
    with pytest.raises(RunError, match=key.replace(".", r"\.")):
        check_same_space(new_ledger(make_space({}), DATA), space, data, "runs/sweep")


def test_read_report_counts_epochs_from_one_and_needs_a_score() -> None:
    entry = {"epoch": 0.0, "step": 12.0, "AP": 0.25, "AP_small": -1.0}
    assert read_report("a", entry, "val/AP") == Report("a", 1, 12, 0.25)
    assert read_report("a", entry, "val/AP_small") is None


@pytest.mark.parametrize(
    "search", [{"samples": 3}, {"sampler": "grid", "repeats": 2}, {"scheduler": "pbt", "samples": 4, "quantile": 0.5}]
)
def test_space_of_a_ledger_is_the_space_in_the_sweeps_folder(search: dict[str, Any]) -> None:
    bundles: dict[str, dict[str, Any]] = {"plain": {}, "refined": {"model.refine": True}}
    made = make_space(search, {"optim.lr, optim.backbone_lr": {"grid": (1e-4, 1e-3)}})
    space = replace(made, axes=(Axis((VARIANT,), Domain(choice=tuple(bundles)), bundles), *made.axes))
    read = space_of(parse_ledger(format_ledger(new_ledger(space, {}))), "/moved/sweep")
    assert read.axes == space.axes
    assert read.search == space.search.model_copy(update={"scheduler": space.search.early_stop})
    assert read.base == space.base.model_copy(update={"storage": "/moved/sweep"})


def test_space_of_a_ledger_with_unknown_settings_names_its_file() -> None:
    ledger = new_ledger(make_space({}), {})
    for changed in (replace(ledger, search={"sampler": "magic"}), replace(ledger, axes=[{"label": "optim.lr"}])):
        with pytest.raises(RunError, match=FILE):
            space_of(changed, "/folder")

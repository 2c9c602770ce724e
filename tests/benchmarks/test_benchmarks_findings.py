"""benchmarks.findings: which units are trained, what their files hold, and the page of rows that have run in part."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from benchmarks import findings
from benchmarks.miniature import training
from benchmarks.miniature.blocks import replace_block
from benchmarks.miniature.results import changed_settings, identity, read_result, record, write_result
from benchmarks.miniature.rows import GROUPS, ROWS, SEEDS, Claim, units
from benchmarks.miniature.tables import differences, group_section, verdict
from benchmarks.miniature.training import METRICS, Drawn, Outcome, draw_data, train_and_evaluate
from jobs.cli import main
from pipeline.config import Config, override
from pipeline.errors import RunError
from pipeline.presets.published import PUBLISHED

DATA = {"train": "1" * 8, "val": "2" * 8, "backbone": "3" * 8}
TINY = ["data.augment.scales=[64]", "data.augment.eval_size=64", "train.epochs=3", "train.eval_epochs=2",
        "train.global_batch=4", "train.micro_batch=4", "model.backbone.width=8", "model.hidden_dim=32",
        "model.enc_layers=1", "model.dec_layers=1"]  # fmt: skip


def outcome(ap: float, epochs: int = 6) -> Outcome:
    curve = [{"epoch": epoch, **dict.fromkeys(METRICS, ap * epoch / epochs)} for epoch in (epochs // 2, epochs)]
    return Outcome(curve, 5.5, 60.0, 1_000_000)


def results(**aps: tuple[float, ...]) -> dict[str, list[dict[str, Any]]]:
    """Of each row; `aps` by row, one for each seed."""
    return {
        name: [
            record(outcome(ap), identity(row.config(seed), DATA), "abc", row=name, seed=seed)
            for seed, ap in enumerate(aps.get(name, ()))
        ]
        for name, row in ROWS.items()
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the two documents."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "docs/findings.md", tmp_path / "docs")
    return tmp_path


def test_every_row_has_the_recipe_of_the_others() -> None:
    common = ("optim.weight_decay", "train.global_batch", "loss.class_weight", "model.queries", "model.hidden_dim",
              "model.backbone.width", "data.augment.scales", "digest of train", "digest of backbone")  # fmt: skip
    recipes = [identity(row.config(0), DATA) for row in ROWS.values()]
    assert len({tuple(str(recipe[key]) for key in common) for recipe in recipes}) == 1
    rates = {(recipe["model.name"], recipe["optim.lr"], recipe["optim.backbone_lr"]) for recipe in recipes}
    assert rates == {("deformable_detr", 1e-3, 1e-3), ("detr", 3e-4, 1e-4)}
    steps = {name: row.config(0).train.epochs for name, row in ROWS.items()}
    assert steps.pop("detr_10x") == 10 * steps["detr"]
    assert len(set(steps.values())) == 1


def test_every_claim_is_about_rows_of_its_group_and_has_the_papers_difference() -> None:
    fields = {"AP": "ap", "AP_small": "ap_small"}
    for group in GROUPS.values():
        for claim in group.claims:
            assert {claim.better, claim.worse} <= set(group.rows)
            if claim.paper is not None:
                better, worse = (
                    getattr(PUBLISHED[ROWS[name].preset], fields[claim.metric]) for name in (claim.better, claim.worse)
                )
                assert round(better - worse, 1) == claim.paper, claim.text


def test_units_are_once_each_group_by_group_and_seed_by_seed() -> None:
    both = [(row.name, seed) for row, seed in units(["a", "b"])]
    assert len(both) == len(set(both)) == len(SEEDS) * len({*GROUPS["a"].rows, *GROUPS["b"].rows})
    assert both[: len(GROUPS["a"].rows)] == [(name, 0) for name in GROUPS["a"].rows]
    assert both[: len(units(["a"]))] == [(row.name, seed) for row, seed in units(["a"])]


def test_standing_units_are_skipped_and_changed_ones_are_trained_again(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train(config: Config, say: object) -> Outcome:
        trained.append(f"{config.model.name} {config.train.epochs} {config.seed}")
        return outcome(0.2)

    monkeypatch.setattr(findings, "prepare", lambda folder: DATA)
    monkeypatch.setattr(findings, "train_and_evaluate", train)
    arguments = ["--rows", "a", "--results", str(tmp_path / "results"), "--root", str(root)]
    assert main(findings.build_parser(), findings.run, arguments) == 0
    assert len(trained) == 12
    files = sorted((tmp_path / "results").iterdir())
    assert [file.name for file in files][:3] == [
        "deformable-seed0.json",
        "deformable-seed1.json",
        "deformable-seed2.json",
    ]
    found = json.loads(files[0].read_text())
    assert {"digest", "commit", "AP", "AP50", "AP_small", "seconds", "loss", "curve", "settings"} <= found.keys()

    files[0].unlink()
    changed = json.loads(files[1].read_text())
    changed["settings"]["optim.lr"], changed["digest"] = 0.5, "other"
    files[1].write_text(json.dumps(changed))
    trained.clear()
    capsys.readouterr()
    assert main(findings.build_parser(), findings.run, arguments) == 0
    assert trained == ["deformable_detr 6 0", "deformable_detr 6 1"]
    said = capsys.readouterr().out
    assert "optim.lr was 0.5, is 0.001" in said
    assert said.count("skipped") == 10


def test_results_outlive_new_settings_but_not_new_data_or_values() -> None:
    content = identity(ROWS["deformable"].config(0), DATA)
    recorded = record(outcome(0.2), content, "abc", row="deformable", seed=0)
    assert changed_settings(recorded, content) == []
    older = {**recorded, "digest": "of fewer settings", "settings": dict(recorded["settings"])}
    del older["settings"]["model.neck"]  # as if it was added since, with its default
    assert changed_settings(older, content) == []
    assert changed_settings(older, {**content, "model.neck": "fpn"}) == ["model.neck was none, is fpn"]
    assert "digest of val" in changed_settings(recorded, {**content, "digest of val": "x"})[0]
    moved = identity(ROWS["deformable"].config(0, "/elsewhere"), DATA)
    assert changed_settings(recorded, moved) == []


def test_a_training_that_fails_does_not_end_the_others(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Config, say: object) -> Outcome:
        if config.model.name == "detr":
            raise RunError("not finite")
        return outcome(0.2)

    monkeypatch.setattr(findings, "prepare", lambda folder: DATA)
    monkeypatch.setattr(findings, "train_and_evaluate", train)
    arguments = ["--rows", "a", "--results", str(tmp_path / "results"), "--root", str(root)]
    assert main(findings.build_parser(), findings.run, arguments) == 1
    assert "detr, seed 2: no result, because not finite" in capsys.readouterr().err
    assert len(list((tmp_path / "results").iterdir())) == 6


def test_results_of_other_settings_are_not_on_the_page(tmp_path: Path) -> None:
    for each in results(detr=(0.1, 0.2))["detr"]:
        write_result(tmp_path / f"detr-seed{each['seed']}.json", each)
    other = read_result(tmp_path / "detr-seed0.json")
    write_result(
        tmp_path / "detr-seed0.json", {**other, "settings": {**other["settings"], "optim.lr": 1.0}, "digest": ""}
    )
    assert [each["seed"] for each in findings.standing_results(tmp_path)["detr"]] == [1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 99}'])
def test_a_damaged_result_is_refused_before_any_training(
    content: str, tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/detr-seed1.json").write_text(content)
    arguments = ["--results", str(tmp_path / "results"), "--root", str(root), "--data", str(tmp_path / "data")]
    assert main(findings.build_parser(), findings.run, arguments) != 0
    assert "detr-seed1.json" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = results(detr=(0.25,))["detr"][0]
    write_result(tmp_path / "detr-seed0.json", written)
    assert read_result(tmp_path / "detr-seed0.json") == written


def test_a_page_of_rows_that_have_run_in_part_marks_the_others(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for each in results(detr=(0.1, 0.2), deformable=(0.3, 0.5, 0.4))["detr"]:
        write_result(folder / f"detr-seed{each['seed']}.json", each)
    arguments = ["--page", "--results", str(folder), "--root", str(root)]
    assert main(findings.build_parser(), findings.run, arguments) == 0
    lines = (root / "docs/findings.md").read_text().splitlines()
    (detr,) = (line for line in lines if line.startswith("| DETR |"))
    assert "15.0 ± 7.1" in detr
    (longer,) = (line for line in lines if line.startswith("| DETR, 10 times"))
    assert "not run yet" in longer
    for name in ("convergence", "ablation"):
        assert (root / f"docs/images/findings_{name}.png").stat().st_size > 1000


def test_means_spreads_and_differences_are_those_of_the_seeds() -> None:
    found = results(detr=(0.1, 0.2, 0.15), deformable=(0.3, 0.5, 0.4))
    section = group_section("a", found)
    assert "40.0 ± 10.0" in section
    claim = GROUPS["a"].claims[0]
    assert differences(claim, found) == pytest.approx([0.2, 0.3, 0.25])
    assert "+25.0 ± 5.0" in section
    assert differences(claim, results(detr=(0.1, 0.2), deformable=(0.3,))) == pytest.approx([0.2])


@pytest.mark.parametrize(
    ("nothing", "found", "said"),
    [
        (False, [0.1, 0.2, 0.1], "yes"),
        (False, [-0.1, -0.2, -0.1], "no"),
        (False, [0.1, -0.2, 0.1], "open"),
        (True, [0.1, -0.2, 0.1], "open"),
        (True, [0.1, 0.2, 0.1], "no"),
        (False, [0.1, 0.2], "2 of 3 seeds"),
        (False, [], ""),
    ],
)
def test_a_claim_is_seen_where_all_seeds_agree(nothing: bool, found: list[float], said: str) -> None:
    assert verdict(Claim("", "", "", None, nothing=nothing), found).startswith(said)


def test_a_block_is_replaced_and_the_text_around_it_stays() -> None:
    text = "a\n<!-- x: made by y -->\nold\n<!-- end of x -->\nb\n"
    once = replace_block(text, "x", r"new \1")
    assert once == "a\n<!-- x: made by y -->\n\nnew \\1\n\n<!-- end of x -->\nb\n"
    assert replace_block(once, "x", r"new \1") == once
    for wrong in ("no block", text + text):
        with pytest.raises(RunError, match="'x'"):
            replace_block(wrong, "x", "new")


def test_two_calls_at_once_draw_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawing, draw = threading.Lock(), training.write_synthetic

    def draw_alone(*arguments: Any, **settings: Any) -> tuple[Path, Path]:
        assert drawing.acquire(blocking=False), "another call is drawing"
        time.sleep(0.1)
        drawing.release()
        return draw(*arguments, **settings)

    monkeypatch.setattr(training, "write_synthetic", draw_alone)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(draw_data, [Drawn(train=2, val=2, side=64)] * 2, [tmp_path] * 2)
    assert first == second


def test_a_training_has_the_same_bits_beside_other_threads_and_learns(tmp_path: Path) -> None:
    import torch

    digests = draw_data(Drawn(train=8, val=4, side=64), tmp_path)
    assert draw_data(Drawn(train=8, val=4, side=64), tmp_path) == digests
    with pytest.raises(RunError, match="8 images"):
        draw_data(Drawn(train=9, val=4, side=64), tmp_path)
    config = override(ROWS["deformable"].config(0, str(tmp_path)), [*TINY, "model.backbone.weights=none"])
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(train_and_evaluate(config))
    first, second = found
    assert (first.curve, first.loss, first.parameters) == (second.curve, second.loss, second.parameters)
    assert [point["epoch"] for point in first.curve] == [2, 3]
    assert first.loss > 0 < first.seconds
    longer = train_and_evaluate(override(config, ["train.epochs=10", "train.eval_epochs=10"]))
    assert longer.loss < first.loss

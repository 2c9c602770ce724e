"""`python -m jobs.evaluate`: numbers to a table, a file or a pipe; wrong input ends with exit 2 and writes nothing."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.paths import ASSETS

from jobs.cli import main
from jobs.evaluate import build_parser, run
from pipeline.checkpoint import TrainState, save
from pipeline.config import Config, dump, from_dict
from pipeline.data.index import Category
from pipeline.data.loader import EvalLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.evaluation.coco import METRICS
from pipeline.evaluation.evaluator import Evaluator
from pipeline.model import build_model
from pipeline.runs.record import RunRecord, write_run
from pipeline.runtime import single

SMALL = ASSETS / "coco_small"
RESULTS, ANNOTATIONS = ["--results", str(SMALL / "results.json")], ["--annotations", str(SMALL / "annotations.json")]
EXPECTED = json.loads((SMALL / "expected.json").read_text())


def evaluate(*arguments: str) -> int:
    return main(build_parser(), run, arguments)


def tiny_config(val: Path) -> Config:
    model = {"num_classes": 5, "hidden_dim": 32, "heads": 4, "enc_layers": 1, "dec_layers": 1, "ffn_dim": 32}
    backbone = {"name": "conv5", "weights": "none", "norm": "group", "width": 8}
    data = {"val": str(val), "workers": 0, "augment": {"eval_size": 96, "max_size": 160}}
    train = {"micro_batch": 2, "global_batch": 2}
    return from_dict(
        {
            "data": data,
            "train": train,
            "model": {**model, "queries": 20, "levels": 3, "op": "torch", "backbone": backbone},
        }
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run folder with a checkpoint of random weights, and what the Evaluator says about them."""
    folder = tmp_path_factory.mktemp("run")
    annotations, images = write_synthetic(folder / "drawn", images=6, seed=8)
    shutil.copy(annotations, folder / "annotations.json")
    build_shards(annotations, images, folder / "val")
    config = tiny_config(folder / "val")
    torch.manual_seed(0)
    model = build_model(config.model)
    loader = EvalLoader(config.data, config.evaluation.micro_batch, 0, 1)
    result = Evaluator(loader, config.data, single()).run(model)
    assert result is not None
    categories = tuple(Category(key, name) for key, name in CATEGORIES.items())
    save(folder / "checkpoint", TrainState(dump(config), categories, "digest", 1, 0, 1, 1), model.state_dict(), {})
    write_run(RunRecord("tiny", str(folder), dump(config), status="FINISHED", last=str(folder / "checkpoint")))
    return folder, result.metrics


def test_evaluate_results_file_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*RESULTS, *ANNOTATIONS) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in lines] == list(METRICS)
    assert [float(value) for _, value in lines] == [round(value, 4) for value in EXPECTED.values()]


def test_evaluate_json_to_stdout_prints_only_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*RESULTS, *ANNOTATIONS, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == EXPECTED


def test_evaluate_json_file_has_the_metrics(tmp_path: Path) -> None:
    assert evaluate(*RESULTS, *ANNOTATIONS, "--json", str(tmp_path / "numbers.json")) == 0
    assert json.loads((tmp_path / "numbers.json").read_text()) == EXPECTED


def test_evaluate_run_equals_the_evaluator(
    trained: tuple[Path, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = trained
    assert evaluate(str(folder), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == metrics
    assert evaluate(str(folder / "run.json"), "data.augment.eval_size=64", "evaluation.micro_batch=4") == 0


def test_evaluate_views_and_top_k_can_be_set(
    trained: tuple[Path, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = trained
    assert evaluate(str(folder), "evaluation.scales=[96]", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == metrics  # the usual look, spelled out
    assert evaluate(str(folder), "evaluation.scales=[64, 96]", "evaluation.flip=true", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) != metrics
    assert evaluate(str(folder), "evaluation.top_k=1", "--json", "-") == 0
    few = json.loads(capsys.readouterr().out)
    assert few["AR1"] == few["AR100"] <= metrics["AR100"]
    assert evaluate(str(folder), "evaluation.scales=[0]") == 2
    assert "evaluation.scales.0" in capsys.readouterr().err


def test_evaluate_save_results_scores_as_the_model(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = trained
    saved = str(tmp_path / "results.json")
    assert evaluate(str(folder), "--save-results", saved) == 0
    capsys.readouterr()
    annotations = str(folder / "annotations.json")
    assert evaluate("--results", saved, "--annotations", annotations, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == metrics


def test_evaluate_per_class_and_split_are_in_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*RESULTS, *ANNOTATIONS, "--per-class", "--split", "test") == 0
    numbers, classes = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in numbers.splitlines()] == [f"test/{name}" for name in METRICS]
    found = [float(line.split()[3]) for line in classes.splitlines()[1:]]
    assert found == sorted(found)
    assert evaluate(*RESULTS, *ANNOTATIONS, "--per-class", "--json", "-") == 0
    document = json.loads(capsys.readouterr().out)
    assert [round(row["AP"], 4) for row in document.pop("classes")] == found
    assert document == EXPECTED


def test_evaluate_registered_model_uses_the_named_store(
    trained: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, metrics = trained
    asked: list[tuple[str, str | None]] = []

    @contextmanager
    def resolve(uri: str, tracking_uri: str | None) -> Iterator[Path]:
        asked.append((uri, tracking_uri))
        yield folder / "checkpoint"

    monkeypatch.setattr("pipeline.registry.register.resolve", resolve)
    assert evaluate("models:/tiny@champion", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == metrics
    assert evaluate("models:/tiny/3", "--tracking-uri", "sqlite:///x.db") == 0
    assert asked == [("models:/tiny@champion", None), ("models:/tiny/3", "sqlite:///x.db")]


def test_evaluate_model_settings_exit_2(
    trained: tuple[Path, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(str(trained[0]), "model.queries=7", "data.labels=raw", "data.workers=0") == 2
    error = capsys.readouterr().err
    assert "model.queries=7, data.labels=raw: " in error


def test_evaluate_other_categories_exit_2(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_synthetic(tmp_path / "drawn", images=2, seed=8)
    tree = json.loads(annotations.read_text())
    tree["categories"][0]["name"] = "plate"
    annotations.write_text(json.dumps(tree))
    build_shards(annotations, images, tmp_path / "val")
    assert evaluate(str(trained[0]), f"data.val={tmp_path / 'val'}") == 2
    assert "other categories than the model" in capsys.readouterr().err


def test_evaluate_json_over_an_input_exits_2(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    results = shutil.copy(SMALL / "results.json", tmp_path)
    assert evaluate("--results", str(results), *ANNOTATIONS, "--json", str(results)) == 2
    assert Path(results).read_bytes() == (SMALL / "results.json").read_bytes()
    state = trained[0] / "checkpoint" / "state.json"
    before = state.read_bytes()
    assert evaluate(str(trained[0]), "--json", str(state)) == 2
    assert state.read_bytes() == before


def test_evaluate_numbers_and_results_into_one_file_exits_2(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = tmp_path / "one.json"
    assert evaluate(str(trained[0]), "--json", str(one), "--save-results", f"{tmp_path}/./one.json") == 2
    assert "cannot both be written" in capsys.readouterr().err
    assert not one.exists()


ENTRY = json.loads((SMALL / "results.json").read_text())[0]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"results": []}, "COCO results are a list"),
        ([ENTRY | {"image_id": 999999}], "images 999999 are not in the annotations"),
        ([ENTRY | {"category_id": 2}], "categories 2 are not in the annotations"),
        ([ENTRY | {"bbox": [1, 2, float("nan"), 4]}], "not four finite numbers"),
        ([ENTRY | {"score": float("nan")}], "not a finite number"),
        (["text"], "not a detection"),
        ([ENTRY | {"file_name": "photos/another.jpg"}], "other ids than the annotations"),
    ],
)
def test_evaluate_bad_results_exit_2(
    tmp_path: Path, results: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "results.json", tmp_path / "out.json"
    path.write_text(json.dumps(results))
    assert evaluate("--results", str(path), *ANNOTATIONS, "--json", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a run"),
        (RESULTS, "give either a run"),
        (ANNOTATIONS, "give either a run"),
        ([*RESULTS, *ANNOTATIONS, "--log"], "--log and --save-results"),
        ([*RESULTS, *ANNOTATIONS, "--save-results", "new.json"], "--log and --save-results"),
        (["no-such-run", "--log"], "there is no run 'no-such-run'"),
        (["no-such-run", "--split", "a/b"], "--split"),
        (["no-such-run", "scaling.num_workers=0"], "scaling.num_workers"),
        ([*RESULTS, *ANNOTATIONS, "evaluation.flip=true"], "without settings"),
        (["somewhere", *RESULTS, *ANNOTATIONS], "give either a run"),
        (["no-such-run"], "there is no run 'no-such-run'"),
        ([*RESULTS, "--annotations", str(SMALL / "results.json")], "not a COCO annotation file"),
        ([*RESULTS, "--annotations", "missing.json"], "cannot read annotations missing.json"),
        ([*RESULTS, *ANNOTATIONS, "--json", str(SMALL / "results.json" / "ap.json")], "cannot write"),
    ],
)
def test_evaluate_bad_arguments_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "AP50" not in captured.out


def test_evaluate_damaged_checkpoint_exits_2(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(trained[0] / "checkpoint", copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0\0")
    write_run(RunRecord("tiny", str(tmp_path), {}, last=str(copy)))
    assert evaluate(str(tmp_path)) == 2
    assert "damaged" in capsys.readouterr().err

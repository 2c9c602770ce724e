"""`python -m jobs.analyse`: a page, plots and JSON of a model or a results file; wrong input writes nothing."""

import json
from pathlib import Path

import mlflow
import pytest
from support.browser import foreign_addresses
from support.detections import planted_detections
from support.inference import small_run
from support.pages import tables_of
from support.paths import ASSETS

from jobs.analyse import build_parser, run
from jobs.cli import main
from jobs.evaluate import build_parser as evaluate_parser
from jobs.evaluate import run as run_evaluate
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.evaluation.coco import ground_truth
from pipeline.registry.register import register
from pipeline.runs.record import RunRecord

SMALL = ASSETS / "coco_small"
RESULTS, ANNOTATIONS = str(SMALL / "results.json"), str(SMALL / "annotations.json")
EXPECTED = json.loads((SMALL / "expected.json").read_text())


def analyse(*arguments: str) -> int:
    return main(build_parser(), run, arguments)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return small_run(tmp_path_factory.mktemp("run"))


def numbers(folder: Path) -> dict[str, float]:
    document = json.loads((folder / "analysis.json").read_text())
    return {name: each["value"] for name, each in document["metrics"].items()}


def test_analyse_results_file_with_annotations_has_the_numbers_of_pycocotools(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyse(RESULTS, "--annotations", ANNOTATIONS, "--out", str(tmp_path / "out")) == 0
    assert numbers(tmp_path / "out") == EXPECTED
    printed = capsys.readouterr().out
    assert str(tmp_path / "out" / "index.html") in printed
    assert f"{EXPECTED['AP']:.3f}" in printed


def test_analyse_run_is_its_evaluation_and_is_logged_in_its_mlflow_run(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "first"
    out.mkdir()
    (out / "notes.txt").write_text("a file of the user, which is not logged")
    assert analyse(record.folder, "--out", str(out), "--draws", "5") == 0
    assert "analysis/first" in capsys.readouterr().out
    assert main(evaluate_parser(), run_evaluate, [record.folder, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers(out)
    client = mlflow.MlflowClient(record.config["tracking"]["uri"])
    logged = Path(client.download_artifacts(record.run_id or "", "analysis/first"))
    assert {path.name: path.read_bytes() for path in logged.iterdir()} == {
        path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".txt"
    }
    html = (out / "index.html").read_text("utf-8")
    assert foreign_addresses(html) == []
    queries = tables_of(html)["Recall over the number of queries that are kept"]
    assert queries[-1]["queries"] == record.config["model"]["queries"]
    assert html.count("data:image/jpeg") > 0


def test_analyse_run_against_a_results_file_on_the_same_images(record: RunRecord, tmp_path: Path) -> None:
    other, out = tmp_path / "other.json", tmp_path / "out"
    truth = ground_truth(record.config["data"]["val"])
    planted_detections(truth).to_results_json(other)
    assert analyse(record.folder, "--against", str(other), "--out", str(out), "--draws", "5") == 0
    comparison = json.loads((out / "analysis.json").read_text())["comparison"]
    assert analyse(str(other), f"data.val={record.config['data']['val']}", "--out", str(tmp_path / "b")) == 0
    assert comparison["metrics"]["AP"]["other"] == numbers(tmp_path / "b")["AP"] > comparison["metrics"]["AP"]["value"]
    assert "other model" in (out / "index.html").read_text("utf-8")


def test_analyse_registered_version_is_its_run_and_is_logged_there(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = record.config["tracking"]["uri"]
    register(record, "small", "champion")
    out = tmp_path / "version"
    model = ("models:/small@champion", "--tracking-uri", uri)
    assert analyse(*model, "--out", str(out), "--draws", "0") == 0
    assert "MLflow: analysis/version" in capsys.readouterr().out
    assert main(evaluate_parser(), run_evaluate, [record.folder, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == numbers(out)
    logged = Path(mlflow.MlflowClient(uri).download_artifacts(record.run_id or "", "analysis/version/analysis.json"))
    assert logged.read_bytes() == (out / "analysis.json").read_bytes()


def test_analyse_version_without_a_store_says_so_once(
    here: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert analyse("models:/x@y") == 2
    assert "no MLflow database" in capsys.readouterr().err
    assert caplog.text == ""
    assert list(here.iterdir()) == []


def test_analyse_checkpoint_folder_has_no_mlflow_run(
    record: RunRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert analyse(record.checkpoint, "--out", str(tmp_path / "out"), "--draws", "0") == 0
    assert "MLflow" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-run"], "no-such-run"),
        ([RESULTS], "--annotations"),
        ([RESULTS, "--annotations", "missing.json"], "missing.json"),
        ([RESULTS, "--annotations", RESULTS], "not a COCO annotation file"),
        ([RESULTS, "--annotations", ANNOTATIONS, "--against", "missing.json"], "missing.json"),
        ([RESULTS, "data.val=/no/shards"], "/no/shards"),
    ],
)
def test_analyse_bad_arguments_exit_2_and_write_nothing(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert analyse(*arguments, "--out", str(out)) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


def test_analyse_results_with_other_ids_than_the_annotations_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = json.loads(Path(RESULTS).read_text())[0] | {"file_name": "photos/another.jpg"}
    (tmp_path / "r.json").write_text(json.dumps([entry]))
    assert analyse(str(tmp_path / "r.json"), "--annotations", ANNOTATIONS, "--out", str(tmp_path / "out")) == 2
    assert "other ids than the annotations" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_analyse_results_of_other_images_exit_2(record: RunRecord, tmp_path: Path) -> None:
    assert analyse(record.folder, "--against", RESULTS, "--out", str(tmp_path / "out")) == 2
    assert not (tmp_path / "out").exists()


def test_analyse_on_shards_of_other_categories_exits_2(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations, images = write_synthetic(tmp_path / "drawn", images=2, seed=8)
    tree = json.loads(annotations.read_text())
    tree["categories"][0]["name"] = "plate"
    annotations.write_text(json.dumps(tree))
    build_shards(annotations, images, tmp_path / "val")
    assert analyse(record.folder, f"data.val={tmp_path / 'val'}", "--out", str(tmp_path / "out")) == 2
    assert "other categories" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_analyse_of_some_images_is_their_evaluation_and_says_so(
    record: RunRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other.json", tmp_path / "out"
    planted_detections(ground_truth(record.config["data"]["val"])).to_results_json(other)
    subset = "evaluation.max_images=3"
    assert analyse(record.folder, subset, "--against", str(other), "--out", str(out), "--draws", "0") == 0
    capsys.readouterr()
    assert main(evaluate_parser(), run_evaluate, [record.folder, subset, "--json", "-"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert {name: expected[name] for name in numbers(out)} == numbers(out)
    assert json.loads((out / "analysis.json").read_text())["images"] == 3
    assert "3 of 6 images" in (out / "index.html").read_text("utf-8")

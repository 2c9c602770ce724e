"""What is found wrong before Ray starts, and how paths are resolved."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_data import picture

from jobs.cli import main
from jobs.train import build_parser, run
from pipeline.config import Config, dump
from pipeline.data.shards import build_shards
from pipeline.data.synthetic import write_synthetic
from pipeline.driver import train
from pipeline.errors import ConfigError, RunError, ShardError
from pipeline.preflight import absolute, check_data
from pipeline.preview import preview
from pipeline.runs import RunRecord, read_run, write_run
from pipeline.snapshot import FILE


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    annotations, images = write_synthetic(folder / "raw", images=12, seed=0, size=64)
    build_shards(annotations, images, folder / "shards")
    return folder / "shards"


def config_of(shards: Path, **model: object) -> Config:
    return Config.model_validate(
        {
            "storage": str(shards.parent / "runs"),
            "data": {"train": str(shards), "val": str(shards)},
            "model": {"num_classes": 5, "backbone": {"weights": "none"}, **model},
            "train": {"global_batch": 4},
        }
    )


@pytest.fixture
def config_file(shards: Path, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dump(config_of(shards))))
    return str(path)


def test_relative_paths_mean_the_drivers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = absolute(Config.model_validate({"data": {"train": "a", "val": "s3://b/c"}}))
    assert config.data.train == str(tmp_path / "a")
    assert config.data.val == "s3://b/c"
    assert config.storage == str(tmp_path / "runs")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute(config) == config


def test_a_storage_in_the_upload_of_a_job_is_refused(shards: Path) -> None:
    """That is what a relative one means there."""
    uploaded = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/runs"
    with pytest.raises(RunError, match=f"storage {uploaded} lies in Ray's copy .* give an absolute path or a URL"):
        train(config_of(shards).model_copy(update={"storage": uploaded}))


def test_wrong_class_count_says_the_right_one(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes=5"):
        check_data(config_of(shards, num_classes=80))


def test_raw_ids_beyond_the_logits_are_refused(tmp_path: Path) -> None:
    """A softmax head would take the first of them for "no object"."""
    tree = {"images": [], "annotations": [], "categories": [{"id": k, "name": str(k)} for k in (1, 91, 95)]}
    for number in range(4):
        picture((48, 64), number).save(tmp_path / f"{number}.jpg")
        tree["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
    (tmp_path / "annotations.json").write_text(json.dumps(tree))
    build_shards(tmp_path / "annotations.json", tmp_path, tmp_path / "shards")
    config = config_of(tmp_path / "shards", num_classes=91)
    raw = config.model_copy(update={"data": config.data.model_copy(update={"labels": "raw"})})
    with pytest.raises(ConfigError, match=r"category ids 91, 95.*model\.num_classes.*data\.labels=contiguous"):
        check_data(raw)


def test_missing_shards_are_named(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        check_data(Config())
    with pytest.raises(ShardError, match="nowhere"):
        check_data(Config.model_validate({"data": {"train": "nowhere", "val": str(shards)}}))


def test_an_epoch_without_a_step_names_the_batch(shards: Path) -> None:
    config = config_of(shards)
    large = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": 64})})
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        check_data(large)


def test_resume_must_find_its_run(shards: Path) -> None:
    with pytest.raises(RunError, match="there is no run"):
        train(config_of(shards), resume="must")


def test_a_name_that_is_taken_exits_2_and_leaves_the_run_alone(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord("run", str(tmp_path / "run"), {}, "id", "FINISHED")
    write_run(record)
    assert main(build_parser(), run, [config_file, f"storage={tmp_path}"]) == 2
    assert f"run {tmp_path}/run exists already; continue it with --resume" in capsys.readouterr().err
    assert read_run(str(tmp_path / "run")) == record


def test_checkpoints_without_a_record_are_not_gone_on_with(shards: Path, tmp_path: Path) -> None:
    """Ray would take them up by the run's name alone."""
    config = config_of(shards).model_copy(update={"storage": str(tmp_path), "name": "old"})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / FILE).write_text("{}")
    for resume in ("no", "auto"):
        with pytest.raises(RunError, match=r"no run\.json; remove it or choose another name="):
            train(config, resume=resume)


def test_dry_run_prints_config_and_plan(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [config_file, "--dry-run", "scaling.num_workers=3", "train.epochs=2"]) == 0
    printed = capsys.readouterr().out
    assert "3 per epoch x 2 epochs = 6 optimizer steps" in printed
    assert "4 images = 2 pad groups of 2; 3 ranks x 1 groups each, 1 of them with weight 0 (33% of the work)" in printed
    assert "GiB per rank" in printed
    assert "learning rates are for" not in printed
    assert yaml.safe_load(printed[: printed.index("\n\ndata  ")])["train"]["epochs"] == 2


def test_dry_run_warns_of_a_batch_that_is_not_the_recipe(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [config_file, "--dry-run", "published.global_batch=16"]) == 0
    assert "learning rates are for 16" in capsys.readouterr().out


def test_zero_and_offload_show_in_the_memory_of_a_rank(shards: Path) -> None:
    def said(**changes: Any) -> str:
        config = config_of(shards)
        train_config = config.train.model_copy(update=changes)
        scaling = config.scaling.model_copy(update={"num_workers": 2})
        plan = preview(config.model_copy(update={"train": train_config, "scaling": scaling}))
        return next(line for line in plan.splitlines() if line.startswith("memory"))

    assert "(ZeRO 0)" in said(zero_stage=0)
    assert "(ZeRO 3, moments in host memory)" in said(zero_stage=3, offload_optimizer=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.learning_rate=1"], "did you mean 'optim.lr'"),
        (["train.epochs=many"], "train.epochs"),
        (["data.train=nowhere"], "nowhere"),
        (["--resume"], "there is no run"),
    ],
)
def test_bad_input_exits_2_and_leaves_nothing(
    config_file: str, shards: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(build_parser(), run, [config_file, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (shards.parent / "runs").exists()

"""Faults that are found before Ray starts, and how paths are resolved."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml
from support.data import noise_image

from jobs.cli import main
from jobs.train import build_parser, run
from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.config import Config, dump
from pipeline.data.balance import epoch_length, read_factors
from pipeline.data.index import check_shards, load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import ConfigError, InputError, ResourceError, RunError, ShardError
from pipeline.launch import driver
from pipeline.launch.driver import train
from pipeline.launch.preflight import check_data, check_disk, check_start, make_paths_absolute
from pipeline.launch.preview import preview
from pipeline.launch.snapshot import FILE
from pipeline.model import build_model
from pipeline.runs.record import RunRecord, read_run, write_run


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
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that comes to Ray fails the test."""
    monkeypatch.setattr(driver, "start_ray", lambda: pytest.fail("Ray was started"))


@pytest.fixture
def config_file(shards: Path, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dump(config_of(shards))))
    return str(path)


def test_make_paths_absolute_uses_the_drivers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_paths_absolute(Config.model_validate({"data": {"train": "a", "val": "s3://b/c"}}))
    assert config.data.train == str(tmp_path / "a")
    assert config.data.val == "s3://b/c"
    assert config.storage == str(tmp_path / "runs")
    assert config.tracking.uri == ""  # the store is chosen later, when it is known whether a run continues
    assert make_paths_absolute(config) == config
    config = make_paths_absolute(Config.model_validate({"tracking": {"uri": "sqlite:///runs/mlflow.db"}}))
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_check_storage_in_uploaded_folder_raises(shards: Path) -> None:
    """That is what a relative one means there."""
    uploaded = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0/runs"
    with pytest.raises(RunError, match=f"storage {uploaded} "):
        train(config_of(shards).model_copy(update={"storage": uploaded}))


def test_check_data_wrong_num_classes_names_the_right_one(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.num_classes=5"):
        check_data(config_of(shards, num_classes=80))


def test_check_data_raw_ids_beyond_logits_raises(tmp_path: Path) -> None:
    """A softmax head would take the first of them for "no object"."""
    tree = {"images": [], "annotations": [], "categories": [{"id": k, "name": str(k)} for k in (1, 91, 95)]}
    for number in range(4):
        noise_image((48, 64), number).save(tmp_path / f"{number}.jpg")
        tree["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
    (tmp_path / "annotations.json").write_text(json.dumps(tree))
    build_shards(tmp_path / "annotations.json", tmp_path, tmp_path / "shards")
    config = config_of(tmp_path / "shards", num_classes=91)
    raw = config.model_copy(update={"data": config.data.model_copy(update={"labels": "raw"})})
    with pytest.raises(ConfigError, match=r"category ids 91, 95.*model\.num_classes.*data\.labels=contiguous"):
        check_data(raw)


def test_check_data_missing_shards_raises(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train is empty"):
        check_data(Config())
    with pytest.raises(ShardError, match="nowhere"):
        check_data(Config.model_validate({"data": {"train": "nowhere", "val": str(shards)}}))


def test_check_data_epoch_without_step_names_global_batch(shards: Path) -> None:
    config = config_of(shards)
    large = config.model_copy(update={"train": config.train.model_copy(update={"global_batch": 64})})
    with pytest.raises(ConfigError, match=r"train\.global_batch"):
        check_data(large)


def test_check_data_balanced_epoch_counts_its_repeats(shards: Path) -> None:
    config = config_of(shards)
    train = config.train.model_copy(update={"global_batch": 14})
    data = config.data.model_copy(update={"balance": 1.0})
    assert len(load_index(str(shards))) < 14 <= epoch_length(read_factors(data))
    check_data(config.model_copy(update={"train": train, "data": data}))


def test_check_run_resume_without_run_raises(shards: Path) -> None:
    with pytest.raises(RunError, match=r"--resume.*/run\b"):
        train(config_of(shards), resume="must")


def test_train_existing_name_exits_2_and_changes_nothing(
    config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord("run", str(tmp_path / "run"), {}, "id", "FINISHED")
    write_run(record)
    assert main(build_parser(), run, [config_file, f"storage={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert all(named in message for named in (f"{tmp_path}/run", "FINISHED", "--resume"))
    assert read_run(str(tmp_path / "run")) == record


def test_check_run_checkpoints_without_record_raise(shards: Path, tmp_path: Path) -> None:
    """Ray would continue from them, because it only compares the run's name."""
    config = config_of(shards).model_copy(update={"storage": str(tmp_path), "name": "old"})
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / FILE).write_text("{}")
    for resume in ("no", "auto"):
        with pytest.raises(RunError, match=r"run\.json"):
            train(config, resume=resume)


def test_dry_run_prints_config_and_plan(config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [config_file, "--dry-run", "scaling.num_workers=3", "train.epochs=2"]) == 0
    printed = capsys.readouterr().out
    assert "3 per epoch x 2 epochs = 6 optimizer steps" in printed
    assert "4 images = 2 pad groups of 2; 3 ranks x 1 groups each, 1 of them with weight 0 (33% of the work)" in printed
    assert "GiB per rank" in printed
    assert "optim.lr=" not in printed
    assert yaml.safe_load(printed[: printed.index("\n\ndata  ")])["train"]["epochs"] == 2


def test_dry_run_says_the_augmentation_and_the_length_of_a_balanced_epoch(
    config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.balance=1", "data.augment.preset=small", "data.augment.hue=0.1"]
    assert main(build_parser(), run, [config_file, "--dry-run", *words]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"^balance +(\d+) samples per epoch instead of (\d+)", printed, re.MULTILINE)
    assert found
    samples, images = map(int, found.groups())
    assert samples > images
    assert f"{samples // 4} per epoch" in printed
    assert re.search(r"^augment +small, .*hue 0.1, ", printed, re.MULTILINE)


def test_preview_memory_follows_zero_stage_and_offload(shards: Path) -> None:
    def said(**changes: Any) -> str:
        config = config_of(shards)
        train_config = config.train.model_copy(update=changes)
        scaling = config.scaling.model_copy(update={"num_workers": 2})
        plan = preview(config.model_copy(update={"train": train_config, "scaling": scaling}))
        return next(line for line in plan.splitlines() if line.startswith("memory"))

    assert "(ZeRO 0)" in said(zero_stage=0)
    assert "(ZeRO 3, moments in host memory)" in said(zero_stage=3, offload_optimizer=True)


def test_preview_warns_once_where_a_stage_of_1_turns_settings_off(shards: Path) -> None:
    config = config_of(shards)
    train_config = config.train.model_copy(
        update={"zero_stage": "auto", "offload_optimizer": True, "channels_last": True, "delay_results": True}
    )
    lines = preview(config.model_copy(update={"train": train_config})).splitlines()
    (line,) = (line for line in lines if "zero_stage=auto is 1" in line)
    assert line.startswith("warning ")
    assert "train.delay_results and train.channels_last" in line


def test_unknown_kernel_is_refused_before_ray_and_names_the_variable(
    config_file: str, no_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEFORMABLE_OP_KERNELS", "sectors,fastest")
    assert main(build_parser(), run, [config_file]) == 2
    assert re.search("DEFORMABLE_OP_KERNELS.*fastest.*specialised", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["optim.learning_rate=1"], "did you mean 'optim.lr'"),
        (["train.epochs=many"], "train.epochs"),
        (["data.train=nowhere"], "nowhere"),
        (["--resume"], "there is no run"),
    ],
)
def test_train_bad_input_exits_2_and_writes_nothing(
    config_file: str, shards: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(build_parser(), run, [config_file, *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (shards.parent / "runs").exists()


def without_shard(shards: Path, folder: Path) -> Path:
    """A copy of a shard folder that lacks one tar."""
    copy = folder / "incomplete"
    shutil.copytree(shards, copy)
    next(copy.glob("*.tar")).unlink()
    return copy


def with_cut_shard(shards: Path, folder: Path) -> Path:
    copy = folder / "cut"
    shutil.copytree(shards, copy)
    tar = next(copy.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    return copy


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("damage", "named"), [(without_shard, r"\.tar "), (with_cut_shard, r"\.tar .*\d,\d{3}\b.*\d,\d{3}\b")]
)
def test_check_run_missing_or_truncated_shards_raise(
    shards: Path, tmp_path: Path, split: str, damage: Any, named: str, no_ray: None
) -> None:
    damaged = damage(shards, tmp_path)
    config = config_of(shards)
    config = config.model_copy(update={"data": config.data.model_copy(update={split: str(damaged)})})
    for check in (train, preview):
        with pytest.raises(ShardError, match=f"{damaged} .*{named}"):
            check(config)


def test_check_run_missing_shard_in_a_store_raises(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{shards}/", "/preflight/", recursive=True)
    index = load_index("memory://preflight")
    check_shards(index)
    memory.rm(f"/preflight/{index.shards[0].name}")
    with pytest.raises(ShardError, match=index.shards[0].name):
        check_shards(index)


@pytest.mark.parametrize("weights", ["nowhere.pth", "IMAGENET1K_V9", "damaged.pth"])
def test_check_run_missing_backbone_weights_raise(shards: Path, tmp_path: Path, weights: str, no_ray: None) -> None:
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    given = weights if weights.startswith("IMAGENET") else str(tmp_path / weights)
    config = config_of(shards, backbone={"name": "resnet50", "weights": given})
    for check in (train, preview):
        with pytest.raises(InputError, match=rf"model\.backbone\.weights.*{weights}"):
            check(config)


@pytest.mark.parametrize("key", ["storage", "TMPDIR"])
def test_check_disk_full_disk_raises(
    shards: Path, tmp_path: Path, key: str, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    usage, stat = shutil.disk_usage, Path.stat
    free = usage("/")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free if Path(path) == small else usage(path))
    other = os.stat_result((0o40755, 0, 99_999, 0, 0, 0, 0, 0, 0, 0))  # a disk of its own
    monkeypatch.setattr(Path, "stat", lambda path, **more: other if path == small else stat(path, **more))
    monkeypatch.setattr(Path, "exists", lambda path: os.path.exists(path))
    config = config_of(shards)
    if key == "storage":
        config = config.model_copy(update={"storage": str(small / "runs")})
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
    for check in (train, preview):
        with pytest.raises(ResourceError, match=rf"{key}={small}"):
            check(config)


def test_check_disk_shared_with_temporary_folder_needs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    free = shutil.disk_usage(tmp_path)._replace(free=150)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_disk(str(tmp_path / "runs"), 75)
    with pytest.raises(ResourceError):
        check_disk(str(tmp_path / "runs"), 76)
    (tmp_path / "a file").touch()
    with pytest.raises(ResourceError, match="storage"):
        check_disk(str(tmp_path / "a file" / "runs"), 1)
    check_disk("s3://bucket/runs", 150)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # the workers have disks of their own
    check_disk(str(tmp_path / "runs"), 150)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_check_start_checkpoint_size_matches_files(shards: Path, tmp_path: Path, ema_decay: float) -> None:
    config = config_of(shards, backbone={"name": "conv5", "weights": "none"})
    config = config.model_copy(update={"train": config.train.model_copy(update={"ema_decay": ema_decay})})
    model = build_model(config.model)
    weights = model.state_dict()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    moments = {f"{key}/{name}": value.clone() for key in ("a", "b") for name, value in trained.items()}
    state = TrainState(dump(config), (), "", 0, 0, 0, 0)
    checkpoint.save(tmp_path / "c", state, weights, moments, weights if ema_decay else None)
    written = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    assert check_start(config, new=True).checkpoint_bytes == pytest.approx(written, rel=0.02)


def test_dry_run_existing_name_exits_2(config_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(RunRecord("run", str(tmp_path / "run"), {}, "id", "FINISHED"))
    assert main(build_parser(), run, [config_file, "--dry-run", f"storage={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--resume" in err


def test_preview_of_equal_train_and_val_warns(shards: Path, tmp_path: Path) -> None:
    config = config_of(shards)
    warned = [line for line in preview(config).splitlines() if line.startswith("warning")]
    assert len(warned) == 1
    assert "data.val" in warned[0]
    annotations, images = write_synthetic(tmp_path / "raw", images=4, seed=1, size=64)
    other = build_shards(annotations, images, tmp_path / "val")
    config = config.model_copy(update={"data": config.data.model_copy(update={"val": other.folder})})
    assert "warning" not in preview(config)

"""Free and used names of runs, and resumes that are refused before anything is written."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.state import STATE_OF_TEST

from pipeline import checkpoint
from pipeline.checkpoint import STATE
from pipeline.config import Config, dump, from_dict
from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import CheckpointError, InputError, RunError
from pipeline.files.folder_lock import FILE as LOCK
from pipeline.launch import driver
from pipeline.launch.driver import train
from pipeline.launch.preflight import check_run
from pipeline.launch.resume_check import check_name
from pipeline.launch.snapshot import repair
from pipeline.runs.record import FILE, IMPORTED, RunRecord, read_run, write_run

NAME = "checkpoint_00000010_0123abcd"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard folders of two sets, and a copy of the first."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("one", "two")):
        annotations, images = write_synthetic(folder / "raw" / name, images=8, seed=seed, size=64)
        build_shards(annotations, images, folder / name)
    shutil.copytree(folder / "one", folder / "copy")
    return folder


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    return from_dict(
        {
            "name": "first",
            "storage": str(tmp_path / "runs"),
            "data": {"train": str(data / "one"), "val": str(data / "one")},
            "model": {"num_classes": 5, "backbone": {"name": "conv5", "weights": "none"}},
            "train": {"global_batch": 4},
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        }
    )


def start(config: Config, status: str = "FINISHED", saved: bool = True, version: int = 2) -> RunRecord:
    """A run of `config`, with one checkpoint if `saved`, as a driver has left it."""
    folder = Path(config.storage) / config.name
    digests = {split: load_index(getattr(config.data, split)).digest for split in ("train", "val")}
    last = str(folder / NAME) if saved else None
    record = RunRecord(config.name, str(folder), dump(config), None, status, last, last, data=digests)
    write_run(record)
    if saved:
        state = replace(STATE_OF_TEST, global_step=10, data_digest=digests["train"], config=dump(config))
        checkpoint.save(folder / NAME, state, {}, {})
        repair(str(folder))
    if version == 1:
        document = {key: value for key, value in vars(record).items() if key != "data"} | {"version": 1}
        (folder / FILE).write_text(json.dumps(document))
    return record


def with_data(config: Config, **folders: Path) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={k: str(v) for k, v in folders.items()})})


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(config: Config, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exit code 2, without Ray, and with every file as it was."""
    monkeypatch.setattr(driver, "start_ray", lambda: pytest.fail("Ray was started"))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=key) as refused:
        train(config, resume="must")
    assert refused.value.exit_code == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("key", ["data.train", "data.val"])
def test_resume_with_other_shards_is_refused_and_changes_nothing(
    config: Config, data: Path, key: str, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config, version=version)
    other = with_data(config, **{key.removeprefix("data."): data / "two"})
    assert_refused(other, rf"{key}=.*two", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model": {"queries": 7}}, r"model\.queries"),
        ({"evaluation": {"flip": True}}, r"evaluation\.flip"),
        ({"evaluation": {"top_k": 50}}, r"evaluation\.top_k"),
        ({"data": {"augment": {"eval_size": 64}}}, r"data\.augment\.eval_size"),
    ],
)
def test_resume_with_other_settings_is_refused_and_changes_nothing(
    config: Config, change: dict[str, dict[str, object]], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(config)
    tree = dump(config)
    for section, values in change.items():
        tree[section] |= values if section != "data" else {"augment": tree["data"]["augment"] | values["augment"]}
    assert_refused(from_dict(tree), key, tmp_path, monkeypatch)


def test_resume_of_damaged_checkpoints_is_refused_and_changes_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = start(config)
    (Path(record.folder) / NAME / STATE).unlink()
    assert_refused(config, "no complete checkpoint", tmp_path, monkeypatch)


LIMITS = [({"epochs": 4}, 8), ({"max_steps": 9}, 9), ({"epochs": 30, "max_steps": 3}, 3)]


@pytest.mark.parametrize(("limits", "total"), LIMITS)
def test_resume_that_would_end_before_the_step_it_has_is_refused_with_settings_that_pass(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], total: int
) -> None:
    """The record would say that 8 steps gave the weights of 10; there are 2 steps per epoch."""
    start(config, "PREEMPTED")
    shorter = config.model_copy(update={"train": config.train.model_copy(update=limits)})
    text = rf"10 steps already, more than the {total} of .* train.epochs=5 train.max_steps=10"
    assert_refused(shorter, text, tmp_path, monkeypatch)
    advised = config.train.model_copy(update={"epochs": 5, "max_steps": 10})
    assert check_run(config.model_copy(update={"train": advised}), "must").previous is not None


@pytest.mark.parametrize("version", [1, 2])
def test_resume_with_the_same_shards_in_another_folder_passes(config: Config, data: Path, version: int) -> None:
    start(config, version=version)
    checked = check_run(with_data(config, train=data / "copy", val=data / "copy"), "must")
    assert checked.previous is not None


def test_resume_of_version_1_whose_val_is_gone_passes_with_a_warning(
    config: Config, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The data that it was evaluated on cannot be found out."""
    gone = tmp_path / "gone"
    shutil.copytree(data / "one", gone)
    start(with_data(config, val=gone), version=1)
    shutil.rmtree(gone)
    with caplog.at_level(logging.WARNING):
        assert check_run(with_data(config, val=data / "two"), "must").previous is not None
    assert "has no digest of data.val" in caplog.text


def test_resume_of_a_run_without_checkpoints_may_take_other_shards(config: Config, data: Path) -> None:
    """Nothing was trained or evaluated yet."""
    start(config, "RUNNING", saved=False)
    assert check_run(with_data(config, train=data / "two", val=data / "two"), "must").previous is not None


def test_name_of_a_running_run_whose_lock_is_not_readable_is_in_use(config: Config, tmp_path: Path) -> None:
    record = start(config, "RUNNING")
    (Path(record.folder) / LOCK).mkdir()
    with pytest.raises(RunError, match="exists already \\(RUNNING\\)"):
        check_name(config, "no")


@pytest.mark.parametrize(
    ("status", "saved", "free"),
    [
        ("FAILED", False, True),
        ("KILLED", False, True),
        ("RUNNING", False, False),
        ("FINISHED", False, False),  # somebody has removed its checkpoints, its record counts
        ("PREEMPTED", False, False),
        (IMPORTED, False, False),
        ("FAILED", True, False),
        ("KILLED", True, False),
        ("RUNNING", True, False),
    ],
)
def test_name_of_a_run_is_free_only_after_a_failure_without_checkpoint(
    config: Config, status: str, saved: bool, free: bool
) -> None:
    record = start(config, status, saved)
    before = contents(Path(record.folder))
    if free:
        assert check_name(config, "no") is None
    else:
        with pytest.raises(RunError, match=f"{record.folder} .*\\({status}\\)"):
            check_name(config, "no")
    assert contents(Path(record.folder)) == before


def test_name_of_a_run_that_failed_in_its_first_upload_is_free(config: Config) -> None:
    record = start(config, "FAILED")
    (Path(record.folder) / NAME / STATE).unlink()
    write_run(replace(record, last=None, best=None))
    with pytest.raises(RunError, match="--resume"):  # Ray's list names it: it was whole once
        check_name(config, "no")
    for path in Path(record.folder).glob("*snapshot.json"):
        path.unlink()
    assert check_name(config, "no") is None


def test_resume_of_a_failed_run_without_checkpoint_takes_other_settings_by_auto_only(config: Config) -> None:
    start(config, "FAILED", saved=False)
    other = config.model_copy(update={"seed": 7})
    assert check_name(config, "auto") == read_run(f"{config.storage}/first")  # the same MLflow run is continued
    assert check_name(other, "auto") is None
    with pytest.raises(RunError, match=r"seed\b.*\b42\b.*\b7\b"):
        check_name(other, "must")


def test_name_whose_folder_has_checkpoints_but_no_record_is_taken(config: Config) -> None:
    record = start(config)
    (Path(record.folder) / FILE).unlink()
    for resume in ("no", "auto", "must"):
        with pytest.raises(RunError, match=r"run\.json"):
            check_name(config, resume)
    for path in Path(record.folder).glob("*snapshot.json"):
        path.unlink()
    with pytest.raises(RunError, match=r"run\.json"):
        check_name(config, "no")


def test_resume_of_imported_weights_is_refused(config: Config) -> None:
    start(config, IMPORTED, saved=False)
    with pytest.raises(RunError, match=r"model\.init_from="):
        check_name(config, "must")


def test_resume_with_foreign_checkpoint_digest_is_refused(config: Config) -> None:
    record = start(config)
    stray = Path(record.folder) / "checkpoint_00000020_0123abcd"
    checkpoint.save(stray, replace(STATE_OF_TEST, global_step=20, data_digest="other"), {}, {})
    with pytest.raises(RunError, match=stray.name):
        check_run(config, "must")


def test_resume_of_unreadable_checkpoint_version_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = start(config)
    path = Path(record.folder) / NAME / STATE
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    assert_refused(config, "version 99", tmp_path, monkeypatch)
    with pytest.raises(CheckpointError):
        check_run(config, "auto")

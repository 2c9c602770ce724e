"""Numbers that are `auto`: chosen once, kept on resume, refused where no single run chooses them."""

from pathlib import Path

import pytest
from support.data import write_shards

from pipeline.config import Config, dump, from_dict
from pipeline.data.index import ShardIndex
from pipeline.launch.preflight import check_run
from pipeline.launch.sizing import estimate
from pipeline.launch.sizing.auto import choose_micro_batch, count_classes, with_numbers, with_recorded
from pipeline.runs.record import RunRecord, write_run


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("auto"))


@pytest.fixture
def config(tmp_path: Path, index: ShardIndex) -> Config:
    tree = {
        "name": "run",
        "storage": str(tmp_path / "runs"),
        "data": {"train": index.folder, "val": index.folder, "augment": {"scales": [64], "crop": 0.0}},
        "model": {"num_classes": "auto", "hidden_dim": 32, "enc_layers": 1, "dec_layers": 1, "queries": 10,
                  "backbone": {"name": "conv5", "weights": "none", "norm": "group", "width": 8}},
        "train": {"global_batch": 12, "micro_batch": "auto"},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }  # fmt: skip
    return from_dict(tree)


def test_check_run_replaces_auto_by_numbers_of_the_data_and_the_machine(config: Config) -> None:
    checked = check_run(config).config
    assert checked.model.classes == 3
    assert config.train.global_batch % checked.train.pad_group == 0


def test_check_run_of_a_run_that_continues_has_the_numbers_of_its_record(
    config: Config, index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = with_numbers(config, 3, 6)
    folder = f"{config.storage}/run"
    digests = {"train": index.digest, "val": index.digest}
    write_run(RunRecord("run", folder, dump(recorded), data=digests))
    monkeypatch.setattr(estimate, "available_memory", lambda config, on_gpu: 0.0)  # a smaller machine
    assert check_run(config, "auto").config.train.micro_batch == 6
    assert with_recorded(with_numbers(config, "auto", 2), recorded).train.micro_batch == 2  # what is given stays


def test_check_run_that_must_continue_a_run_without_a_checkpoint_has_its_numbers(
    config: Config, index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {"train": index.digest, "val": index.digest}
    recorded = dump(with_numbers(config, 3, 6))
    write_run(RunRecord("run", f"{config.storage}/run", recorded, data=digests, status="FAILED"))
    monkeypatch.setattr(estimate, "available_memory", lambda config, on_gpu: 0.0)
    assert check_run(config, "must").config.train.micro_batch == 6
    assert check_run(config, "auto").config.train.micro_batch == 1  # it may have failed because of the number


@pytest.mark.parametrize(("memory", "workers", "expected"), [(1e15, 1, 4), (1e15, 5, 2), (0.0, 1, 1)])
def test_choose_micro_batch_takes_the_largest_divisor_that_fits_and_gives_every_worker_one(
    config: Config, index: ShardIndex, monkeypatch: pytest.MonkeyPatch, memory: float, workers: int, expected: int
) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda config, on_gpu: memory)
    scaling = config.scaling.model_copy(update={"num_workers": workers})
    known = count_classes(config.model_copy(update={"scaling": scaling}), index)
    assert choose_micro_batch(known, index).train.micro_batch == expected


def test_count_classes_with_raw_labels_is_the_published_layout(config: Config, index: ShardIndex) -> None:
    raw = config.model_copy(update={"data": config.data.model_copy(update={"labels": "raw"})})
    assert count_classes(raw, index).model.classes == 91

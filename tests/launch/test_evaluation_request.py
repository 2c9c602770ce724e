"""What the evaluation of a trained model takes: open settings, a name for other data, its own workers."""

from pathlib import Path

import pytest
from support.helpers import tiny_config

from pipeline.config import ScalingConfig
from pipeline.errors import ConfigError
from pipeline.launch.evaluation_request import check_request

RECORDED = tiny_config(scaling={"num_workers": 8, "min_workers": 4, "max_failures": 9})


def test_check_request_closed_setting_raises_with_its_name() -> None:
    for text in ("optim.lr=1", "scaling.min_workers=1", "model.queries=7"):
        with pytest.raises(ConfigError, match=text):
            check_request("run", ["evaluation.flip=true", text])


@pytest.mark.parametrize("split", ["", "a b", "1st", "test/AP", "x" * 51])
def test_check_request_name_that_is_no_name_raises(split: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        check_request("run", [], split)


def test_apply_takes_the_workers_of_the_request_and_not_of_the_training() -> None:
    request = check_request("run", ["scaling.num_workers=2", "scaling.cpus_per_worker=3"])
    assert request.on_actors
    assert request.apply(RECORDED).scaling == ScalingConfig(num_workers=2, cpus_per_worker=3)
    plain = check_request("run", ["scaling.use_gpu=false"])
    assert not plain.on_actors
    assert plain.apply(RECORDED).scaling == ScalingConfig(use_gpu=False)


def test_apply_makes_paths_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_request("run", ["data.val=shards/test"]).apply(RECORDED).data.val == str(tmp_path / "shards/test")


@pytest.mark.parametrize("changed", ["data.val=other", "evaluation.flip=true", "data.augment.eval_size=64"])
def test_apply_log_of_another_evaluation_needs_a_name(changed: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        check_request("run", [changed], log=True).apply(RECORDED)
    for split in ("test", "val"):
        check_request("run", [changed], split, log=True).apply(RECORDED)
    check_request("run", [changed]).apply(RECORDED)


def test_apply_log_of_the_same_evaluation_needs_no_name() -> None:
    same = ["data.augment.eval_size=96", "data.workers=0", "scaling.num_workers=2", "evaluation.task_minutes=5"]
    check_request("run", same, log=True).apply(RECORDED)

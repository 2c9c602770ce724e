"""Checks of a sweep before Ray: faults exit 2, a name is free or in use, and a ledger is found."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recorded_sweeps import small_base
from support.sweeps import Play, make_space

from jobs.cli import main
from pipeline.errors import ConfigError, RunError, ShardError
from pipeline.files.atomic import temporary_name
from pipeline.model import build_model
from tune.search.ledger import FILE, write_ledger
from tune.settings import Domain
from tune.space import VARIANT, Axis, Space
from tune.sweep import build_parser, run
from tune.trials.check import check_sweep, find_ledger


def test_faults_exit_2_before_ray(space_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, [str(space_file), "optim.drop_epoch=3"]) == 2
    assert "did you mean 'optim.drop_epochs'?" in capsys.readouterr().err
    folder = f"storage={tmp_path}/runs"
    assert main(build_parser(), run, [str(space_file), folder]) == 2
    assert "data.train is empty" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_missing_shards_are_found_before_ray(tmp_path: Path) -> None:
    space = make_space({})
    data = space.base.data.model_copy(update={"train": str(tmp_path / "no"), "val": str(tmp_path / "no")})
    with pytest.raises(ShardError):
        check_sweep(Space(space.base.model_copy(update={"data": data}), space.search, space.axes))


def space_of_weights(tmp_path: Path, bundles: dict[str, dict[str, Any]]) -> Space:
    """A space with local paths below the current folder, in its config and in its variants."""
    base = small_base(tmp_path, 4)
    torch.save({"model": build_model(base.model).state_dict()}, tmp_path / "weights.pth")
    data = base.data.model_copy(update={"train": "val", "val": "val", "tail": "wrap"})
    model = base.model.model_copy(update={"init_from": "weights.pth"})
    base = base.model_copy(update={"data": data, "model": model, "storage": "runs"})
    search = {"sampler": "grid", "points": [{VARIANT: next(iter(bundles)), "data.val": "val"}]}
    made = make_space(search, {"data.val": {"grid": ("val",)}})
    return replace(made, base=base, axes=(Axis((VARIANT,), Domain(choice=tuple(bundles)), bundles), *made.axes))


def test_relative_paths_are_those_of_the_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = space_of_weights(tmp_path, {"trained": {}, "same": {"model.init_from": "weights.pth"}})
    checked = check_sweep(space)
    config = checked.space.config({VARIANT: "same", "data.val": f"{tmp_path}/val"}, "trial")
    assert (config.model.init_from, config.data.val) == (f"{tmp_path}/weights.pth", f"{tmp_path}/val")
    assert checked.space.search.points == ({VARIANT: "trained", "data.val": f"{tmp_path}/val"},)
    write_ledger(checked.space.base.storage, checked.ledger)
    assert check_sweep(space, "must").ledger.axes == checked.ledger.axes


@pytest.mark.parametrize(
    ("bundle", "fault"),
    [
        ({"data.train": "no"}, "space: variant: wrong: .*no"),
        ({"data.tail": "drop", "train.global_batch": 64}, "space: variant: wrong: data.train has 8 samples"),
        ({"model.init_from": "no.pth"}, "space: variant: wrong: .*no.pth"),
        ({"model.hidden_dim": 64}, "space: variant: wrong: .*weights.pth"),
    ],
)
def test_values_that_no_trial_can_read_are_found_before_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: dict[str, Any], fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    space = space_of_weights(tmp_path, {"right": {}, "wrong": bundle})
    with pytest.raises(ConfigError, match=fault):
        check_sweep(space)
    assert not (tmp_path / "runs").exists()


def test_a_metric_that_validation_cannot_have_is_found_before_ray(tmp_path: Path) -> None:
    """Its value would be -1 after every epoch of every trial."""
    space = make_space({"metric": "val/AP_large"})
    base = small_base(tmp_path, 4)
    data = base.data.model_copy(update={"train": f"{tmp_path}/val", "val": f"{tmp_path}/val", "tail": "wrap"})
    with pytest.raises(ConfigError, match=r"search.metric: .*/val has no large objects"):
        check_sweep(replace(space, base=base.model_copy(update={"data": data})))


@pytest.mark.parametrize(
    ("there", "resume", "message"),
    [
        ("folder", "no", r"sweep .*/sweep\b"),
        ("ledger", "no", "--resume"),
        ("folder", "must", FILE),
        ("folder", "auto", FILE),
        ("nothing", "must", "--resume: .*/sweep;"),
    ],
)
def test_find_ledger_refuses_a_name_that_does_not_fit(tmp_path: Path, there: str, resume: Any, message: str) -> None:
    folder = tmp_path / "sweep"
    if there != "nothing":
        folder.mkdir()
        (folder / "notes.txt").touch()
    if there == "ledger":
        write_ledger(str(folder), Play(make_space({})).sweep.ledger)
    with pytest.raises(RunError, match=message):
        find_ledger(str(folder), resume)


@pytest.mark.parametrize(("there", "resume"), [(False, "no"), (False, "auto"), (True, "must"), (True, "auto")])
def test_find_ledger_continues_or_starts(tmp_path: Path, there: bool, resume: Any) -> None:
    ledger = Play(make_space({})).sweep.ledger
    if there:
        write_ledger(str(tmp_path / "sweep"), ledger)
    assert find_ledger(str(tmp_path / "sweep"), resume) == (ledger if there else None)


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_find_ledger_after_a_kill_at_the_first_write_starts(tmp_path: Path, resume: Any) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / temporary_name(FILE)).touch()
    assert find_ledger(str(tmp_path / "sweep"), resume) is None

"""Checks of a sweep before Ray: faults exit 2, a name is free or in use, and a ledger is found."""

from pathlib import Path
from typing import Any

import pytest
from support.sweeps import Play, make_space

from jobs.cli import main
from pipeline.errors import RunError, ShardError
from pipeline.files.atomic import temporary_name
from tune.search.ledger import FILE, write_ledger
from tune.space import Space
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

"""Repair of Ray's list of checkpoints after each kind of damage, read by Ray's own CheckpointManager."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ray.train import CheckpointConfig
from support.helpers import as_version_3
from support.ray_internals import (
    CheckpointManager,
    CheckpointManagerInitializationError,
    StorageContext,
    list_reported,
)
from support.state import STATE_OF_TEST

from pipeline import checkpoint
from pipeline.checkpoint import STATE, WEIGHTS
from pipeline.errors import CheckpointError, CheckpointVersionError
from pipeline.evaluation.coco import METRICS
from pipeline.launch.snapshot import FILE, inspect_checkpoints, repair
from pipeline.runs.evaluations import FILE as EVALUATIONS
from pipeline.runs.evaluations import Evaluation, read_evaluations, write_evaluations
from pipeline.training.saving import NO_AP, SCORE

APS = {10: 0.2, 20: 0.5, 30: 0.4}  # AP of the checkpoint at each step


def write(run: Path, step: int, ap: float | None = None) -> str:
    name = f"checkpoint_{step:08d}_0123abcd"
    checkpoint.save(run / name, replace(STATE_OF_TEST, global_step=step), {}, {})
    if ap is not None:
        write_evaluations(str(run), [*read_evaluations(str(run)), row(name, step, ap)])
    return name


def row(name: str, step: float, ap: float) -> Evaluation:
    return Evaluation(name, {"epoch": 0.0, "step": float(step), **dict.fromkeys(METRICS, 0.0), "AP": ap})


def ranked(run: Path) -> dict[int, float]:
    """AP by step as Ray has it, the best one last."""
    return {each.metrics["global_step"]: each.metrics[SCORE] for each in list_reported(rays_view(run))}


def rays_view(run: Path) -> CheckpointManager:
    """The run as Ray sees it when it starts again."""
    config = CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE, checkpoint_score_order="max")
    return CheckpointManager(config, StorageContext(str(run.parent), run.name))


def latest(run: Path) -> str:
    result = rays_view(run).latest_checkpoint_result
    assert result is not None
    return Path(result.checkpoint.path).name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints in a list that `repair` itself has made."""
    folder = tmp_path / "run"
    for step, ap in APS.items():
        write(folder, step, ap)
    repair(str(folder))
    return folder


def test_repair_lost_list_is_rebuilt_from_folders(run: Path) -> None:
    (run / FILE).unlink()
    assert [each.state.global_step for each in repair(str(run))] == [*APS]
    assert rays_view(run).latest_checkpoint_result.metrics["global_step"] == 30
    assert [*ranked(run).items()] == sorted(APS.items(), key=lambda each: each[1])


def test_repair_writes_evaluations_into_rays_list(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One evaluation was written, but Ray did not get it, because the driver died; another was never written."""
    names = [f"checkpoint_{step:08d}_0123abcd" for step in APS]
    write_evaluations(str(run), [row(names[0], 10, 0.7), row(names[1], 20, 0.5)])
    caplog.clear()
    repair(str(run))
    assert not caplog.records
    assert [*ranked(run).items()] == [(30, NO_AP), (20, 0.5), (10, 0.7)]


def test_repair_reads_evaluations_of_0_1_from_states(run: Path) -> None:
    """Each state has the evaluations up to its own; of the one at step 5 the checkpoint is gone."""
    (run / EVALUATIONS).unlink()
    entries = [row("", step, ap).entry for step, ap in {5: 0.1, **APS}.items()]
    for number, step in enumerate(APS):
        as_version_3(run / f"checkpoint_{step:08d}_0123abcd", *entries[: number + 2])
    repair(str(run))
    found = read_evaluations(str(run))
    assert [each.entry for each in found] == entries
    assert [each.checkpoint for each in found] == ["", *(f"checkpoint_{step:08d}_0123abcd" for step in APS)]
    assert ranked(run) == APS
    before = (run / EVALUATIONS).stat().st_mtime_ns, (run / FILE).stat().st_mtime_ns
    repair(str(run))
    assert before == ((run / EVALUATIONS).stat().st_mtime_ns, (run / FILE).stat().st_mtime_ns)


def test_repair_keeps_the_file_of_a_run_of_0_1_with_tasks(run: Path) -> None:
    for step in APS:
        as_version_3(run / f"checkpoint_{step:08d}_0123abcd", row("", step, 0.0).entry)
    repair(str(run))
    assert [each.entry["AP"] for each in read_evaluations(str(run))] == [*APS.values()]


def test_repair_damaged_checkpoint_is_not_the_best_one(run: Path) -> None:
    """It stays where it is, and so does its AP in the curve."""
    (run / "checkpoint_00000020_0123abcd" / WEIGHTS).unlink()
    repair(str(run))
    assert {each.checkpoint: each.entry["AP"] for each in read_evaluations(str(run))} == {
        "checkpoint_00000010_0123abcd": 0.2, "": 0.5, "checkpoint_00000030_0123abcd": 0.4,
    }  # fmt: skip


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_repair_truncated_list_is_rebuilt_and_kept(run: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    whole = (run / FILE).read_bytes()
    (run / FILE).write_bytes(whole[:kept])
    with pytest.raises(CheckpointManagerInitializationError):
        rays_view(run)
    with caplog.at_level(logging.WARNING):
        repair(str(run))
    assert "is damaged" in caplog.text
    assert (run / f"{FILE}.damaged").read_bytes() == whole[:kept]
    assert latest(run) == "checkpoint_00000030_0123abcd"


def test_repair_lost_checkpoint_leaves_the_list(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(run / "checkpoint_00000030_0123abcd")
    with pytest.raises(CheckpointManagerInitializationError):
        rays_view(run)
    with caplog.at_level(logging.WARNING):
        assert [each.state.global_step for each in repair(str(run))] == [10, 20]
    assert "checkpoint_00000030_0123abcd cannot be used: it is gone" in caplog.text
    assert latest(run) == "checkpoint_00000020_0123abcd"


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_repair_newest_half_written_continues_from_earlier(
    run: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = run / "checkpoint_00000030_0123abcd"
    if damage == "cut":
        (newest / WEIGHTS).write_bytes((newest / WEIGHTS).read_bytes()[:-1])
    elif damage == "missing":
        (newest / WEIGHTS).unlink()
    else:
        (newest / STATE).write_text((newest / STATE).read_text()[:50])
    with caplog.at_level(logging.WARNING):
        repair(str(run))
    assert latest(run) == "checkpoint_00000020_0123abcd"
    assert newest.name in caplog.text
    assert newest.exists()  # it was complete once, and the user may want to inspect it


def test_repair_healthy_list_changes_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = (run / FILE).read_bytes()
    with caplog.at_level(logging.WARNING):
        repair(str(run))
    assert (run / FILE).read_bytes() == before
    assert not caplog.records


def test_repair_stored_but_unlisted_checkpoint_is_listed(run: Path) -> None:
    """A newer one is listed, an older one is ignored, a half-written one is removed."""
    newer, older = write(run, 40), write(run, 5)
    half = write(run, 50)
    (run / half / STATE).unlink()
    assert [each.state.global_step for each in repair(str(run))] == [*APS, 40]
    assert latest(run) == newer
    assert (run / older).exists()
    assert not (run / half).exists()


FOREIGN = [
    "checkpoint_best_backup", "checkpoint_00000100_ab", "checkpoint_00000100_0123abcd.bak", "checkpoint_100_0123abcd",
    "checkpoint_00000100_0123ABCD", "checkpoint_00000100_0123abcde", "my_checkpoint_00000100_0123abcd", "checkpoint_",
]  # fmt: skip


@pytest.mark.parametrize("lost_list", [False, True])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", FOREIGN)
def test_repair_foreign_name_is_neither_listed_nor_removed(
    run: Path, name: str, whole: bool, lost_list: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A copy that the user made, also of the newest, also one whose copying was stopped."""
    shutil.copytree(run / write(run, 100), run / name)
    shutil.rmtree(run / f"checkpoint_{100:08d}_0123abcd")
    if not whole:
        (run / name / STATE).unlink()
    if lost_list:
        (run / FILE).unlink()
    before = sorted(path.name for path in (run / name).iterdir())
    with caplog.at_level(logging.WARNING):
        assert [each.state.global_step for each in repair(str(run))] == [*APS]
    assert sorted(path.name for path in (run / name).iterdir()) == before
    assert latest(run) == "checkpoint_00000030_0123abcd"
    assert (f"{name} is not in Ray's list" in caplog.text) == name.startswith("checkpoint_")


def test_repair_foreign_copy_of_another_version_is_ignored(run: Path) -> None:
    copy = run / "checkpoint_old"
    shutil.copytree(run / "checkpoint_00000030_0123abcd", copy)
    (copy / STATE).write_text(json.dumps({"version": 99}))
    assert [each.state.global_step for each in repair(str(run))] == [*APS]


@pytest.mark.parametrize("rays_list", ["none", "empty"])
def test_repair_killed_in_its_first_upload_starts_from_nothing(tmp_path: Path, rays_list: str) -> None:
    """Nothing was ever registered, so nothing is lost."""
    half = tmp_path / write(tmp_path, 10)
    (half / WEIGHTS).unlink()
    if rays_list == "empty":
        (tmp_path / FILE).write_text(json.dumps({"checkpoint_results": [], "latest_checkpoint_result": None}))
    assert repair(str(tmp_path), stored_before=False) == []
    assert not half.exists()


def test_repair_without_list_of_a_run_that_had_a_checkpoint_removes_nothing(tmp_path: Path) -> None:
    half = tmp_path / write(tmp_path, 10)
    (half / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        repair(str(tmp_path))
    assert half.exists()


@pytest.mark.parametrize("damage", ["none", "cut list", "half-written", "newer"])
def test_inspect_checkpoints_changes_nothing(run: Path, damage: str) -> None:
    if damage == "cut list":
        (run / FILE).write_bytes((run / FILE).read_bytes()[:50])
    if damage in ("half-written", "newer"):
        newer = run / write(run, 50)
    if damage == "half-written":
        (newer / STATE).unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    usable = [each.state.global_step for each in inspect_checkpoints(str(run)).usable]
    assert usable == [*APS, *([50] if damage == "newer" else [])]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_repair_keeps_rays_other_metrics(run: Path) -> None:
    document = json.loads((run / FILE).read_text())
    for entry in document["checkpoint_results"]:
        entry["metrics"]["perf/images_per_s"] = 7.0
    (run / FILE).write_text(json.dumps(document))
    shutil.rmtree(run / "checkpoint_00000030_0123abcd")
    repair(str(run))
    assert {result.metrics["perf/images_per_s"] for result in list_reported(rays_view(run))} == {7.0}


def test_repair_keeps_pending_evaluations(run: Path) -> None:
    """Of the checkpoints that are there; Ray begins with them when it starts."""
    document = json.loads((run / FILE).read_text())
    document["pending_training_results"] = document["checkpoint_results"]
    document["pending_validation_specs"] = [True, {"fn_kwargs": {}, "timeout_s": 5.0}, True]
    specs = dict(
        zip((e["checkpoint_dir_name"] for e in document["checkpoint_results"]), [True, 5.0, True], strict=True)
    )
    (run / FILE).write_text(json.dumps(document))
    shutil.rmtree(run / "checkpoint_00000030_0123abcd")
    repair(str(run))
    pending = rays_view(run).get_pending_training_results()
    found = {Path(c.path).name: getattr(spec, "timeout_s", spec) for c, (_, spec) in pending.items()}
    assert found == {name: spec for name, spec in specs.items() if name != "checkpoint_00000030_0123abcd"}


def test_repair_without_complete_checkpoint_raises(run: Path) -> None:
    for step in APS:
        (run / f"checkpoint_{step:08d}_0123abcd" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        repair(str(run))


@pytest.mark.parametrize("listed", [True, False])
def test_repair_other_version_raises_and_removes_nothing(run: Path, listed: bool) -> None:
    newest = run / (f"checkpoint_{30:08d}_0123abcd" if listed else write(run, 40))
    before = (run / FILE).read_bytes()
    document = json.loads((newest / STATE).read_text())
    (newest / STATE).write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(CheckpointVersionError, match=rf"{newest.name}: state\.json .*\b99\b"):
        repair(str(run))
    assert newest.exists()
    assert (run / FILE).read_bytes() == before


def test_repair_empty_run_does_nothing(tmp_path: Path) -> None:
    assert repair(str(tmp_path)) == []
    assert not (tmp_path / FILE).exists()


def test_repair_store_works_like_a_folder(tmp_path: Path) -> None:
    """Through fsspec; `local://` is the one store that needs no server."""
    name = write(tmp_path / "run", 10)
    assert [each.name for each in repair(f"local://{tmp_path}/run")] == [name]
    assert latest(tmp_path / "run") == name

"""A run's folder under any sequence of saves, kills and damage: what `repair` promises, and that twice is once."""

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from support.state import STATE_OF_TEST

from pipeline import checkpoint
from pipeline.checkpoint import STATE, WEIGHTS
from pipeline.errors import CheckpointError
from pipeline.evaluation.coco import METRICS
from pipeline.launch import snapshot
from pipeline.launch.snapshot import FILE, inspect_checkpoints, repair
from pipeline.runs.evaluations import Evaluation, read_evaluations, write_evaluations
from pipeline.training.saving import NO_AP, SCORE

STEPS_OF_REPAIR = ("move", "write_bytes", "write_evaluations", "remove", "remove_unfinished_files")
Files = dict[str, bytes]
pick = st.integers(0, 99)


class Killed(BaseException):
    """Stands for the end of the process."""


def files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def of_folder(found: Files, name: str) -> Files:
    return {path: content for path, content in found.items() if path.startswith(f"{name}/")}


def repair_killed(run: Path, steps: int) -> None:
    """A repair whose process ends before its change number `steps` of the folder, or after all of them."""
    left = [steps]

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            change(*args)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS_OF_REPAIR:
            patch.setattr(snapshot, name, counting(getattr(snapshot, name)))
        with contextlib.suppress(Killed):
            repair(str(run))


class RunFolder(RuleBasedStateMachine):
    """The model: which folders are complete or broken, what Ray's list names, and the AP of each checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = TemporaryDirectory()
        self.run = Path(self.scratch.name) / "run"
        self.run.mkdir()
        self.complete: dict[str, int] = {}  # steps
        self.broken: set[str] = set()
        self.kept: set[str] = set()  # broken ones that a repair has found in the list
        self.foreign: set[str] = set()
        self.listed: list[str] | None = None  # None: there is no list
        self.cut = False  # the list cannot be read
        self.registered = False  # the run's record names a checkpoint
        self.ap: dict[int, float] = {}
        self.named: dict[int, str] = {}  # the checkpoint of an evaluation, by step
        self.step = 0

    def teardown(self) -> None:
        self.scratch.cleanup()

    def fresh(self, evaluated: bool) -> str:
        self.step += 1
        name = f"checkpoint_{self.step:08d}_0123abcd"
        checkpoint.save(self.run / name, replace(STATE_OF_TEST, config={}, global_step=self.step), {}, {})
        self.complete[name] = self.step
        if evaluated:
            self.ap[self.step], self.named[self.step] = self.step * 7 % 10 / 10, name
            entry = {"epoch": 0.0, "step": float(self.step), **dict.fromkeys(METRICS, 0.0), "AP": self.ap[self.step]}
            write_evaluations(str(self.run), [*read_evaluations(str(self.run)), Evaluation(name, entry)])
        return name

    def ray_writes(self) -> None:
        entries = [
            {"version": 0, "checkpoint_dir_name": name, "metrics": {"global_step": self.complete.get(name, 0)}}
            for name in self.listed or ()
        ]
        latest = entries[-1] if entries else None
        (self.run / FILE).write_text(
            json.dumps({"checkpoint_results": entries, "latest_checkpoint_result": latest}), encoding="utf-8"
        )

    @property
    def healthy(self) -> bool:
        """Ray runs only where the list agrees with the folders."""
        return (
            not self.cut
            and all(name in self.complete for name in self.listed or ())
            and (self.listed is not None or not (self.complete or self.broken))
        )

    @precondition(lambda self: self.healthy)
    @rule(evaluated=st.booleans())
    def save(self, evaluated: bool) -> None:
        self.listed = [*(self.listed or ()), self.fresh(evaluated)]
        self.registered = True
        self.ray_writes()

    @precondition(lambda self: self.healthy)
    @rule(evaluated=st.booleans())
    def save_killed_before_it_is_listed(self, evaluated: bool) -> None:
        self.fresh(evaluated)

    @precondition(lambda self: self.healthy)
    @rule(lacks=st.sampled_from([STATE, WEIGHTS, "bytes"]))
    def save_killed_in_the_upload(self, lacks: str) -> None:
        self.damage(self.fresh(False), lacks)

    @precondition(lambda self: self.healthy and len(self.listed or ()) > 1)
    @rule(which=pick, left=st.sampled_from(["nothing", "whole", STATE]))
    def ray_retires_one(self, which: int, left: str) -> None:
        """First from its list, then the folder, between which it may be killed."""
        assert self.listed is not None
        name = self.listed.pop(which % (len(self.listed) - 1))
        self.ray_writes()
        if left == "nothing":
            self.drop(name)
        elif left != "whole":
            self.damage(name, left)

    def damage(self, name: str, lacks: str) -> None:
        self.complete.pop(name, None)
        self.broken.add(name)
        if lacks == "bytes":
            (self.run / name / WEIGHTS).write_bytes(b"x")
        else:
            (self.run / name / lacks).unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        shutil.rmtree(self.run / name)
        self.complete.pop(name, None)
        self.broken.discard(name)
        self.kept.discard(name)

    @precondition(lambda self: self.complete)
    @rule(which=pick, lacks=st.sampled_from([STATE, WEIGHTS, "bytes"]))
    def disk_damages(self, which: int, lacks: str) -> None:
        self.damage(sorted(self.complete)[which % len(self.complete)], lacks)

    @precondition(lambda self: self.complete or self.broken)
    @rule(which=pick)
    def user_removes(self, which: int) -> None:
        names = sorted({*self.complete, *self.broken})
        self.drop(names[which % len(names)])

    @precondition(lambda self: self.listed is not None)
    @rule(kept=st.one_of(st.none(), st.integers(0, 40)))
    def list_is_lost_or_cut(self, kept: int | None) -> None:
        path = self.run / FILE
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:kept])
        self.listed, self.cut = None, kept is not None

    @precondition(lambda self: self.complete)
    @rule(which=pick, whole=st.booleans())
    def user_copies(self, which: int, whole: bool) -> None:
        name = f"checkpoint_copy_{len(self.foreign)}"
        shutil.copytree(self.run / sorted(self.complete)[which % len(self.complete)], self.run / name)
        if not whole:
            (self.run / name / STATE).unlink()
        self.foreign.add(name)

    @rule(number=st.integers(0, 15))
    def writer_killed(self, number: int) -> None:
        (self.run / f".{number:032x}.evaluations.json").write_bytes(b"{")

    @rule(kill=st.one_of(st.none(), st.integers(0, 6)))
    def repair(self, kill: int | None) -> None:
        listed = self.listed or []
        newest = max((self.complete[name] for name in listed if name in self.complete), default=-1)
        usable = [n for n, step in self.complete.items() if self.listed is None or n in listed or step > newest]
        lost = {*listed} - {*usable}
        before = files(self.run)
        if not usable and (lost or (self.broken and self.listed is None and (self.registered or self.cut))):
            with pytest.raises(CheckpointError):
                repair(str(self.run), self.registered)
            assert files(self.run) == before
            return
        if kill is not None and self.registered:
            twin = self.run.with_name("twin")
            shutil.copytree(self.run, twin)
            repair(str(twin))
            repair_killed(self.run, kill)
        found = repair(str(self.run), self.registered)
        after = files(self.run)
        if kill is not None and self.registered:
            assert after == files(twin)
            shutil.rmtree(twin)
        assert [each.name for each in found] == sorted(usable, key=lambda name: self.complete[name])
        self.kept |= lost & self.broken
        for name in (*self.complete, *self.foreign, *(self.broken & self.kept)):
            assert of_folder(after, name) == of_folder(before, name)
        for name in self.broken - self.kept:
            assert not (self.run / name).exists()
        self.broken &= self.kept
        self.named = {step: "" if name in lost else name for step, name in self.named.items()}
        rows = {row.entry["step"]: (row.checkpoint, row.entry["AP"]) for row in read_evaluations(str(self.run))}
        assert rows == {step: (name, self.ap[step]) for step, name in self.named.items()}
        assert (self.run / FILE).exists() == bool(usable or self.listed is not None)
        if (self.run / FILE).exists():
            self.check_list([each.name for each in found])
            self.listed = [each.name for each in found]
        if self.cut:
            assert (self.run / f"{FILE}.damaged").read_bytes() == before[FILE]
        self.cut = False
        assert not [path for path in after if path.startswith(".")]
        self.repair_again(after)

    def check_list(self, names: list[str]) -> None:
        document = json.loads((self.run / FILE).read_text())
        scores = {each["checkpoint_dir_name"]: each["metrics"].get(SCORE) for each in document["checkpoint_results"]}
        by_name = {name: self.ap[step] for step, name in self.named.items()}
        assert scores == {name: by_name.get(name, NO_AP) for name in names}
        latest = document["latest_checkpoint_result"]
        assert (latest and latest["checkpoint_dir_name"]) == (names[-1] if names else None)

    def repair_again(self, after: Files) -> None:
        found = inspect_checkpoints(str(self.run), self.registered)
        assert (found.list_fault, found.lost, found.half_written) == ("", {}, [])
        times = {path: path.stat().st_mtime_ns for path in self.run.rglob("*")}
        assert [each.name for each in repair(str(self.run), self.registered)] == [each.name for each in found.usable]
        assert files(self.run) == after
        assert {path: path.stat().st_mtime_ns for path in self.run.rglob("*")} == times


TestRunFolder = RunFolder.TestCase
TestRunFolder.settings = settings(max_examples=20, stateful_step_count=15, deadline=None)

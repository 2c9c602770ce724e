"""Uploads of checkpoints into a working, a full, an unwritable, and an unshared storage."""

import errno
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from support.ray_internals import StorageContext
from support.state import STATE_OF_TEST

from pipeline import checkpoint
from pipeline.errors import StorageError
from pipeline.evaluation.coco import METRICS
from pipeline.files.scratch import Scratch, scratch_folder
from pipeline.files.storage import ray_storage
from pipeline.runs.evaluations import Evaluation, from_report
from pipeline.training.saving import NO_AP, SCORE, Upload, build_manifest, report_metrics

WEIGHTS = {"weight": torch.arange(50_000.0)}  # 200 kB


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a test; it must be empty at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def upload_to(run_folder: str, storage: StorageContext, name: str) -> ray.train.Checkpoint:
    scratch = Scratch("checkpoint")
    checkpoint.save(scratch.folder, STATE_OF_TEST, WEIGHTS, {})
    return Upload(run_folder, storage, scratch)(ray.train.Checkpoint.from_directory(scratch.folder), name)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only; the next test raises the same error without one")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_upload_full_disk_keeps_earlier_checkpoint(small_disk: Path, temporary: Path) -> None:
    upload = partial(upload_to, f"{small_disk}/run", StorageContext(str(small_disk), "run"))
    stored = upload("checkpoint_1")
    with pytest.raises(StorageError, match=r"run/checkpoint_2.*[Nn]o space left"):
        upload("checkpoint_2")
    assert not (small_disk / "run" / "checkpoint_2").exists()  # nothing half-written
    assert torch.equal(checkpoint.load(stored.path).weights["weight"], WEIGHTS["weight"])
    assert list(temporary.iterdir()) == []  # the local copies are gone either way


class FullStorage(StorageContext):
    """Ray's storage, half of whose copies fails."""

    def persist_current_checkpoint(self, checkpoint: Any, checkpoint_dir_name: str) -> Any:
        folder = Path(self.build_checkpoint_path_from_name(checkpoint_dir_name))
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_upload_fails_half_way_removes_its_files(tmp_path: Path, temporary: Path) -> None:
    with pytest.raises(StorageError, match="No space left on device"):
        upload_to(f"{tmp_path}/run", FullStorage(str(tmp_path), "run"), "checkpoint_1")
    assert not (tmp_path / "run" / "checkpoint_1").exists()
    assert list(temporary.iterdir()) == []


class SlowStorage(StorageContext):
    """Ray's storage, whose copies take long."""

    started: Any

    def persist_current_checkpoint(self, checkpoint: Any, checkpoint_dir_name: str) -> Any:
        self.started.set()
        time.sleep(600)


def test_upload_worker_killed_files_are_removed_by_next_scratch(tmp_path: Path, temporary: Path) -> None:
    context = multiprocessing.get_context("fork")
    storage = SlowStorage(str(tmp_path), "run")
    storage.started = context.Event()
    worker = context.Process(target=upload_to, args=(f"{tmp_path}/run", storage, "checkpoint_1"))
    worker.start()
    assert storage.started.wait(60)
    with scratch_folder("other"):
        assert len(list(temporary.glob("*/model.safetensors"))) == 1, "it is being uploaded"
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    with scratch_folder("other") as folder:
        assert list(temporary.iterdir()) == [folder]


def test_upload_unshared_storage_raises(tmp_path: Path) -> None:
    storage = StorageContext(str(tmp_path), "run")
    (tmp_path / "run" / ".validate_storage_marker").unlink()  # as on a node that has another disk there
    with pytest.raises(StorageError, match=rf"storage .*{tmp_path}/run"):
        upload_to(f"{tmp_path}/run", storage, "checkpoint_1")


def test_upload_into_fsspec_store_loads_back(tmp_path: Path) -> None:
    path, filesystem = ray_storage(f"local://{tmp_path}/store")
    stored = upload_to(f"local://{tmp_path}/store/run", StorageContext(path, "run", filesystem), "checkpoint_1")
    with stored.as_directory() as folder:
        assert checkpoint.load(folder).state == STATE_OF_TEST
    assert checkpoint.load(tmp_path / "store/run/checkpoint_1").state == STATE_OF_TEST


def test_ray_storage_plain_path_stays(tmp_path: Path) -> None:
    assert ray_storage(str(tmp_path)) == (str(tmp_path), None)


def test_report_metrics_unevaluated_weights_have_no_ap() -> None:
    row = Evaluation("checkpoint_99", {"epoch": 2.0, "step": 99.0, "AP": 0.25})
    assert report_metrics(STATE_OF_TEST, row) == {
        "epoch": 3, "global_step": 99, SCORE: 0.25, "val/epoch": 2.0, "val/step": 99.0,
    }  # fmt: skip
    unscored = report_metrics(STATE_OF_TEST, None)
    assert {unscored[f"val/{name}"] for name in METRICS} == {NO_AP}
    assert from_report("checkpoint_99", unscored) is None


def test_build_manifest_lists_newest_first() -> None:
    known = [
        ("/bucket/run/checkpoint_1", {"global_step": 1, "epoch": 0, SCORE: 0.5}),
        ("/bucket/run/checkpoint_2", {"global_step": 2, "epoch": 1, SCORE: NO_AP}),
    ]
    assert build_manifest("s3://bucket/run", known) == [
        {"path": "s3://bucket/run/checkpoint_2", "epoch": 1, "global_step": 2},
        {"path": "s3://bucket/run/checkpoint_1", "epoch": 0, "global_step": 1, SCORE: 0.5},
    ]

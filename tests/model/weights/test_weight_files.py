"""Files of weights: accepted files, refused files, and no code of a file is ever run."""

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from support.helpers import tiny_checkpoint, tiny_run
from torch import Tensor

from pipeline.errors import CheckpointError, RunError
from pipeline.model.weights.files import STATE, WEIGHTS, read_tensors, read_weights
from pipeline.runs.record import write_run

# as little as tells a layout
PUBLISHED = {"backbone.0.body.conv1.weight": torch.ones(2), "transformer.level_embed": torch.zeros(3)}
HUGGING_FACE = {"model.backbone.conv_encoder.model.conv1.weight": torch.ones(2)}
SETTINGS = {"with_box_refine": True, "two_stage": False, "num_feature_levels": 4, "lr_backbone_names": ["backbone.0"]}


def document(**changes: Any) -> dict[str, Any]:
    """What the published training code saves."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 40)
    states = {"optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict()}
    return {"model": PUBLISHED, **states, "epoch": 49, "args": argparse.Namespace(**SETTINGS), **changes}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_weights_published_checkpoint_with_namespace(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "r50_deformable_detr-checkpoint.pth"
    torch.save(document(), path, _use_new_zipfile_serialization=zipped)
    file = read_weights(str(path))
    assert (file.source, file.layout) == (str(path), "published")
    assert same(file.tensors, PUBLISHED)
    assert file.variant == {"with_box_refine": True, "two_stage": False, "num_feature_levels": 4}


def test_read_weights_tensors_with_any_suffix(tmp_path: Path) -> None:
    torch.save(HUGGING_FACE, tmp_path / "pytorch_model.bin")
    save_file(PUBLISHED, tmp_path / "weights.pth")
    assert read_weights(str(tmp_path)).layout == "hugging_face"  # a folder as Hugging Face writes it
    assert same(read_weights(str(tmp_path / "weights.pth")).tensors, PUBLISHED)
    save_file(HUGGING_FACE, tmp_path / WEIGHTS)
    assert same(read_weights(str(tmp_path)).tensors, HUGGING_FACE)


def test_read_weights_folder_run_and_url(tmp_path: Path) -> None:
    record = tiny_run(tmp_path / "run")
    write_run(record)
    expected = read_tensors(Path(record.checkpoint) / WEIGHTS)
    for source in (record.checkpoint, record.folder):
        file = read_weights(source)
        assert file.layout == "own"
        assert same(file.tensors, expected)
    memory = fsspec.filesystem("memory")
    memory.put(record.checkpoint, "/weights/checkpoint", recursive=True)
    memory.put_file(f"{record.checkpoint}/{WEIGHTS}", "/weights/file.safetensors")
    assert same(read_weights("memory://weights/checkpoint").tensors, expected)
    assert same(read_weights("memory://weights/file.safetensors").tensors, expected)
    with pytest.raises(RunError, match="memory://weights/nothing"):
        read_weights("memory://weights/nothing")


class Malicious:
    """Pickles as a call of `os.mkdir`: unpickling it would leave a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["args", "model", "epoch"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_read_weights_pickle_with_code_is_refused(tmp_path: Path, place: str, zipped: bool) -> None:
    path, trace = tmp_path / "bad.pth", tmp_path / "ran"
    torch.save(document(**{place: Malicious(trace)}), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bad\.pth .*(posix|os|nt)\.mkdir"):
        read_weights(str(path))
    assert not trace.exists()


@pytest.mark.parametrize("protocol", [2, 5])
def test_read_weights_bare_pickle_is_refused(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "bare.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"model": Malicious(trace)}, protocol))
    with pytest.raises(CheckpointError, match=r"bare\.pth"):
        read_weights(str(path))
    assert not trace.exists()
    assert pickle.loads(path.read_bytes()) == {"model": None}  # the trap works: plain pickle falls into it
    assert trace.exists()


def test_read_weights_other_class_is_refused(tmp_path: Path) -> None:
    torch.save(document(args=Path("x")), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="pathlib"):
        read_weights(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_read_weights_truncated_file_raises(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / "weights"
    if form == "safetensors":
        save_file(PUBLISHED | {"transformer.big": torch.zeros(5000)}, path)
    else:
        torch.save(document(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=str(path)):
        read_weights(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>quota exceeded", "web page"),
        (b"\xff\xd8\xff\xe0JFIF and so on", r"x\.pth"),
        (b"PK\3\4 and then no zip", r"x\.pth"),
        (b"\x80\2 and then no pickle", r"x\.pth"),
        (b"\x10\0\0\0\0\0\0\0{\"a\": [1, 2, 3]}}", "safetensors"),
    ],
)  # fmt: skip
def test_read_weights_foreign_file_raises(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_weights(str(tmp_path / "x.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "optimizer": {}}, "`model`.* epoch, optimizer"),
        ({"model": {"backbone.0.x": 3}}, r"`model`.* backbone\.0\.x"),
        ([torch.zeros(1)], "list"),
        (torch.zeros(1), "Tensor"),
        ({"fc.weight": torch.zeros(1)}, r"\(fc\.weight\)"),
        ({}, r"x\.pth"),
    ],
)
def test_read_weights_other_torch_file_raises(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(str(tmp_path / "x.pth"))


def test_read_weights_folder_without_weights_raises(tmp_path: Path) -> None:
    for source, message in [
        (str(tmp_path / "absent.pth"), r"absent\.pth"),
        (str(tmp_path), str(tmp_path)),
        ("models:/mine@champion", "models:/mine@champion"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            read_weights(source)


def test_read_weights_damaged_checkpoint_raises(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    state = json.loads((folder / STATE).read_text())
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read_weights(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=WEIGHTS):
        read_weights(str(folder))
    del state["sha256"]
    (folder / STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=STATE):
        read_weights(str(folder))


def test_read_weights_of_a_path_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """Such as one without permission, which tests of root do not meet."""
    with pytest.raises(CheckpointError, match=r"cannot read .*: File name too long"):
        read_weights(str(tmp_path / ("x" * 300)))

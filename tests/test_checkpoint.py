"""Checkpoints: exact round trip, and the faults of a folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import as_version_3
from support.state import STATE_OF_TEST, TINY

from pipeline import checkpoint
from pipeline.checkpoint import AVERAGE, OPTIMIZER, STATE, WEIGHTS, TrainState
from pipeline.data.index import Category
from pipeline.errors import CheckpointError, StorageError
from pipeline.model import build_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = build_model(TINY).state_dict()
    moments = {"exp_avg/x": torch.randn(3), "exp_avg_sq/x": torch.rand(3)}
    checkpoint.save(tmp_path / "c", STATE_OF_TEST, weights, moments)
    return tmp_path / "c"


@pytest.fixture
def averaged(folder: Path) -> Path:
    """The same with an average of the weights, which is 1 everywhere."""
    loaded = checkpoint.load(folder)
    average = {name: torch.ones_like(tensor) for name, tensor in loaded.weights.items()}
    checkpoint.save(folder, loaded.state, loaded.weights, loaded.moments, average)
    return folder


def test_load_equals_saved(folder: Path) -> None:
    torch.manual_seed(0)
    model = build_model(TINY)
    loaded = checkpoint.load(folder)
    assert loaded.state == STATE_OF_TEST
    expected = model.state_dict()
    assert loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)
    assert torch.equal(loaded.moments["exp_avg/x"], torch.randn(3))
    assert loaded.average is None


def test_save_average_is_separate_file(averaged: Path) -> None:
    loaded = checkpoint.load(averaged)
    assert loaded.average is not None
    assert loaded.average.keys() == loaded.weights.keys()
    assert all((tensor == 1).all() for tensor in loaded.average.values())
    assert not all((tensor == 1).all() for tensor in loaded.weights.values())


def test_load_inference_uses_average(averaged: Path) -> None:
    (averaged / WEIGHTS).unlink()  # it is not even read
    model = checkpoint.load_inference(averaged).model
    assert all((tensor == 1).all() for tensor in model.state_dict().values())


def test_load_inference_rebuilds_model(folder: Path) -> None:
    inference = checkpoint.load_inference(folder)
    assert not inference.model.training
    assert [c.name for c in inference.categories] == ["disc", "ring", "cross"]
    images, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    torch.manual_seed(0)
    fresh = build_model(TINY).eval()
    with torch.no_grad():
        assert torch.equal(inference.model(images, mask)["pred_boxes"], fresh(images, mask)["pred_boxes"])


@pytest.mark.parametrize(("kind", "file"), [("folder", WEIGHTS), ("averaged", AVERAGE)])
def test_copy_inference_copies_only_needed_files(
    kind: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Path = request.getfixturevalue(kind)
    checkpoint.copy_inference(source, tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {file, STATE}
    ours, theirs = (checkpoint.load_inference(each).model.state_dict() for each in (source, tmp_path / "copy"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_save_writes_no_pickle(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {WEIGHTS, OPTIMIZER, STATE}
    json.loads((folder / STATE).read_text())


@pytest.mark.parametrize("name", [WEIGHTS, AVERAGE, OPTIMIZER])
def test_load_flipped_bit_raises(averaged: Path, name: str) -> None:
    data = bytearray((averaged / name).read_bytes())
    data[-1] ^= 1
    (averaged / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(averaged)
    if name == AVERAGE:
        with pytest.raises(CheckpointError, match=name):
            checkpoint.copy_inference(averaged, averaged / "copy")


@pytest.mark.parametrize("name", [WEIGHTS, AVERAGE, OPTIMIZER, STATE])
def test_load_missing_file_is_named(averaged: Path, name: str) -> None:
    (averaged / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(averaged)


def test_load_first_version_works(folder: Path) -> None:
    """It is the same without an average."""
    document = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**document, "version": 1}))
    assert checkpoint.load(folder).average is None
    checkpoint.load_inference(folder)


def test_load_other_version_raises(folder: Path) -> None:
    document = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**document, "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        checkpoint.load_state(folder)


def test_restore_weights_other_model_raises(folder: Path) -> None:
    other = build_model(TINY.model_copy(update={"queries": 6}))
    with pytest.raises(CheckpointError, match="query_embed"):
        checkpoint.restore_weights(other, checkpoint.load(folder).weights)


def test_load_version_3_gives_the_evaluations_in_it(folder: Path) -> None:
    entries = ({"epoch": 0.0, "step": 50.0, "AP": 0.125}, {"epoch": 2.0, "step": 99.0, "AP": 0.25})
    as_version_3(folder, *entries)
    assert checkpoint.load(folder).state == dataclasses.replace(STATE_OF_TEST, history=entries)


def test_save_writes_no_evaluation(folder: Path) -> None:
    loaded = checkpoint.load(folder)
    old = dataclasses.replace(loaded.state, history=({"epoch": 2.0, "step": 99.0, "AP": 0.25},))
    checkpoint.save(folder, old, loaded.weights, loaded.moments)
    assert "AP" not in (folder / STATE).read_text()
    assert checkpoint.load(folder).state == STATE_OF_TEST


def test_save_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="storage"):
        checkpoint.save(tmp_path / "file" / "c", STATE_OF_TEST, {}, {})


def test_train_state_replace_changes_one_field(folder: Path) -> None:
    assert dataclasses.replace(checkpoint.load_state(folder), epoch=4).epoch == 4


DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool,
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Of any bits, NaN among them; whole, transposed or cut out of a larger one, as models and ZeRO hand them out."""
    found = {}
    for name in draw(
        st.lists(st.text(min_size=1).filter(lambda name: name != "__metadata__"), unique=True, max_size=4)
    ):
        dtype, rows, columns = draw(st.tuples(st.sampled_from(DTYPES), st.integers(0, 3), st.integers(0, 3)))
        data = draw(st.binary(min_size=rows * columns * dtype.itemsize, max_size=rows * columns * dtype.itemsize))
        raw = torch.tensor(list(data), dtype=torch.uint8)
        value = (raw % 2 if dtype is torch.bool else raw).view(dtype).reshape(rows, columns)
        layout = draw(st.sampled_from(["whole", "transposed", "row", "scalar"]))
        if layout == "transposed":
            value = value.T
        elif layout == "row" and rows:
            value = value[-1]
        elif layout == "scalar" and value.numel():
            value = value[0, 0]
        found[name] = value.requires_grad_(draw(st.booleans())) if dtype.is_floating_point else value
    return found


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (t.dtype, t.shape, bytes(t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()))
        for name, t in tensors.items()
    }


count = st.integers(0, 2**53)
categories = st.builds(Category, st.integers(0, 2**31), st.text())
states = st.builds(
    TrainState,
    st.dictionaries(st.text(), JSON, max_size=4), st.lists(categories, max_size=3).map(tuple), st.text(), count, count,
    count, count, st.dictionaries(st.text(), JSON, max_size=2),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(states, tensors(), tensors(), st.none() | tensors())
def test_load_any_tensors_and_state_are_those_saved(
    state: TrainState,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    average: dict[str, torch.Tensor] | None,
) -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "c"
        checkpoint.save(folder, state, weights, moments, average)
        loaded = checkpoint.load(folder)
        assert checkpoint.load_state(folder) == loaded.state == state
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert checkpoint.check_files((folder / STATE).read_bytes(), sizes) == state
        again = Path(scratch) / "again"
        checkpoint.save(again, loaded.state, loaded.weights, loaded.moments, loaded.average)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            path.name: path.read_bytes() for path in again.iterdir()
        }
    assert (bits(loaded.weights), bits(loaded.moments)) == (bits(weights), bits(moments))
    assert (loaded.average is None) == (average is None)
    assert bits(loaded.average or {}) == bits(average or {})

"""A process of the loader: what it answers, and how it ends."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.data import write_shards

from pipeline.data.batch import Packed
from pipeline.data.dataset import DetectionDataset
from pipeline.data.groups import Request, make
from pipeline.data.processes import GroupProcess
from pipeline.data.slots import SharedSlots
from pipeline.data.transforms import View


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    return DetectionDataset(write_shards(tmp_path_factory.mktemp("processes"), images=3).folder)


@pytest.fixture(scope="module")
def slots() -> SharedSlots:
    return SharedSlots(2, 3 * 96 * 96)


@pytest.fixture
def process(data: DetectionDataset, slots: SharedSlots) -> Iterator[GroupProcess]:
    made = GroupProcess([data.shared()], slots)
    yield made
    made.close()
    made.join()


def request(data: DetectionDataset, i: int, source: int = 0) -> Request:
    return Request(source, (i,), (View(False, data.size(i)),), False, i, 1.0)


def test_groups_are_written_into_their_slots(data: DetectionDataset, slots: SharedSlots, process: GroupProcess) -> None:
    for i in (0, 1):
        process.send(1 - i, request(data, i))
    for i in (0, 1):
        asked = request(data, i)
        expected = np.empty(asked.shape, np.uint8)
        made = process.receive()
        assert isinstance(made, Packed)
        assert made.image_ids == make(asked, [data], expected).image_ids
        assert np.array_equal(slots.pixels(1 - i, made.shape), expected)


def test_what_goes_wrong_is_told_with_its_place(data: DetectionDataset, process: GroupProcess) -> None:
    process.send(0, request(data, 0, source=7))
    error = process.receive()
    assert isinstance(error, RuntimeError)
    assert f"in process {process.pid} of the loader: " in str(error)
    assert "groups.py" in str(error)
    assert str(error).rstrip().endswith("IndexError: list index out of range")
    process.send(0, request(data, 1))
    assert isinstance(process.receive(), Packed), "it goes on"


def test_ctrl_c_is_left_to_the_training_process(data: DetectionDataset, process: GroupProcess) -> None:
    """A terminal sends it to all processes; the training process may still want to finish its step."""
    for i in (0, 1):
        process.send(i, request(data, i))
        assert isinstance(process.receive(), Packed)  # it has started
        os.kill(process.pid, signal.SIGINT)


def test_a_killed_one_is_named(data: DetectionDataset, process: GroupProcess) -> None:
    process.send(0, request(data, 0))
    process.receive()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^a process of the loader was killed by signal 9; .* lower data\.workers"):
        process.receive()
    with pytest.raises(RuntimeError, match="killed by signal 9"):
        process.send(0, request(data, 0))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the state of processes from /proc")
def test_it_ends_after_what_it_is_at(data: DetectionDataset, process: GroupProcess) -> None:
    process.send(0, request(data, 0))
    process.close()
    process.join()
    assert not Path(f"/proc/{process.pid}").exists()

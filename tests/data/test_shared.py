"""Memory shared with child processes: one copy, read-only where it must be, gone with its last user."""

import copy
import multiprocessing
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.processes import run_child

from pipeline.data.shared import SharedArray, SharedBytes, share


@dataclass(frozen=True)
class Columns:
    a: NDArray[np.int64]
    b: NDArray[np.int32]
    c: NDArray[np.float64]


def columns() -> Columns:
    return Columns(np.arange(1000), np.arange(7, dtype=np.int32)[::2], np.ones((5, 3)))


def child(memory: SharedBytes, shared: Columns, pipe: Any) -> None:
    memory.array[10:13] = [1, 2, 3]
    pipe.send((shared.a.sum(), shared.b.tolist(), type(shared.a).__name__, shared.a.flags.writeable))
    pipe.recv()
    pipe.send(int(memory.array[0]))


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_children_see_the_same_memory(method: str) -> None:
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["pipeline.data.processes"])  # the server stays for all tests that follow
    memory, shared = SharedBytes(30), share(columns())
    with run_child(context, child, memory, shared) as pipe:
        assert pipe.recv() == (499500, [0, 2, 4, 6], "SharedArray", False)
        assert memory.array[10:14].tolist() == [1, 2, 3, 0]
        memory.array[0] = 9
        pipe.send(None)
        assert pipe.recv() == 9


def test_shared_columns_are_equal_and_read_only() -> None:
    original, shared = columns(), share(columns())
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(getattr(original, name), getattr(shared, name))
        assert getattr(original, name).dtype == getattr(shared, name).dtype
        with pytest.raises(ValueError, match="read-only"):
            getattr(shared, name)[0] = 1
    assert int(shared.a[5]) == 5


def test_what_is_computed_from_them_is_an_ordinary_array() -> None:
    shared = share(columns())
    for array in (shared.a + 1, shared.a[3:9], copy.deepcopy(shared.a + 1)):
        again = pickle.loads(pickle.dumps(array))
        assert not isinstance(again, SharedArray)
        np.testing.assert_array_equal(again, array)


def test_empty_columns() -> None:
    shared = share(Columns(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, 2))))
    assert [len(shared.a), len(shared.b), shared.c.shape] == [0, 0, (0, 2)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        memory, shared = SharedBytes(10_000), share(columns())
        assert len(memory.array) == 10_000
        assert shared.a[1] == 1
        del memory, shared
    assert len(os.listdir("/proc/self/fd")) <= before + 1

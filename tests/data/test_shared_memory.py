"""Memory shared with child processes: one copy, read-only where it must be, gone with its last user."""

import copy
import multiprocessing
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.processes import run_child

from pipeline.data.shared_memory import Pixels, SharedArray, SharedBytes, SharedSlots, SlotLender, share


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
def test_shared_bytes_in_child_processes_are_the_same_memory(method: str) -> None:
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["pipeline.data.worker_pool"])  # the server stays for all tests that follow
    memory, shared = SharedBytes(30), share(columns())
    with run_child(context, child, memory, shared) as pipe:
        assert pipe.recv() == (499500, [0, 2, 4, 6], "SharedArray", False)
        assert memory.array[10:14].tolist() == [1, 2, 3, 0]
        memory.array[0] = 9
        pipe.send(None)
        assert pipe.recv() == 9


def test_share_of_columns_gives_equal_read_only_arrays() -> None:
    original, shared = columns(), share(columns())
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(getattr(original, name), getattr(shared, name))
        assert getattr(original, name).dtype == getattr(shared, name).dtype
        with pytest.raises(ValueError, match="read-only"):
            getattr(shared, name)[0] = 1
    assert int(shared.a[5]) == 5


def test_shared_array_in_a_computation_gives_an_ordinary_array() -> None:
    shared = share(columns())
    for array in (shared.a + 1, shared.a[3:9], copy.deepcopy(shared.a + 1)):
        again = pickle.loads(pickle.dumps(array))
        assert not isinstance(again, SharedArray)
        np.testing.assert_array_equal(again, array)


def test_share_of_empty_columns_keeps_their_shapes() -> None:
    shared = share(Columns(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, 2))))
    assert [len(shared.a), len(shared.b), shared.c.shape] == [0, 0, (0, 2)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_shared_bytes_when_dropped_leave_no_open_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        memory, shared = SharedBytes(10_000), share(columns())
        assert len(memory.array) == 10_000
        assert shared.a[1] == 1
        del memory, shared
    assert len(os.listdir("/proc/self/fd")) <= before + 1


SHAPE = (2, 3)


def lender(count: int, in_work: int) -> SlotLender:
    return SlotLender(SharedSlots(count, 8), in_work)


def is_copy(made: SlotLender, pixels: Pixels) -> bool:
    return not any(np.may_share_memory(pixels, made.slots.pixels(slot, SHAPE)) for slot in range(made.slots.count))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_slot_lender_never_reuses_a_slot_that_is_read(spare: int, seed: int) -> None:
    """A consumer keeps batches for as long as it likes and drops them in any order; some runs are left half way."""
    rng, in_work = random.Random(seed), 3
    made = lender(in_work + spare, in_work)
    sent: list[int] = []
    held: list[tuple[int, torch.Tensor]] = []
    copies = 0
    for number in range(300):
        while len(sent) < in_work and rng.random() < 0.8:
            slot = made.send()
            made.slots.pixels(slot, SHAPE)[:] = number % 251
            sent.append(number % 251)
        if sent and rng.random() < 0.9:
            pixels = made.claim(SHAPE)
            copies += is_copy(made, pixels)
            held.append((sent.pop(0), torch.from_numpy(pixels)[1:]))
            del pixels
        while held and rng.random() < 0.4:
            held.pop(rng.randrange(len(held)))
        if rng.random() < 0.02:
            made.begin()
            sent.clear()
        assert all((tensor == content).all() for content, tensor in held)
    assert copies if not spare else copies < 300, "a spare slot saves copies"


def test_slot_lender_copies_only_where_slots_run_short() -> None:
    made = lender(4, in_work=2)
    held = []
    for expected in (False, False, True, True):
        made.send()
        held.append(made.claim(SHAPE))
        assert is_copy(made, held[-1]) == expected
    del held[0]
    made.send()
    assert not is_copy(made, made.claim(SHAPE))


def test_pixels_outlive_their_slots() -> None:
    made = lender(2, in_work=1)
    made.slots.pixels(made.send(), SHAPE)[:] = 7
    kept = torch.from_numpy(made.claim(SHAPE))
    del made
    assert (kept == 7).all()


def test_slots_do_not_overlap_and_pickle_to_the_same_memory() -> None:
    slots = SharedSlots(3, 6)
    for slot in range(3):
        slots.pixels(slot, SHAPE)[:] = slot
    assert [slots.pixels(slot, (6,)).tolist() for slot in range(3)] == [[0] * 6, [1] * 6, [2] * 6]
    pickle.loads(pickle.dumps(slots)).pixels(1, SHAPE)[:] = 9
    assert slots.pixels(0, (18,)).tolist() == [0] * 6 + [9] * 6 + [2] * 6

"""Slots: a request gets one that nobody reads or writes, at any moment, however long batches are kept."""

import pickle
import random

import numpy as np
import pytest
import torch

from pipeline.data.slots import Lender, Pixels, SharedSlots

SHAPE = (2, 3)


def lender(count: int, in_work: int) -> Lender:
    return Lender(SharedSlots(count, 8), in_work)


def is_copy(made: Lender, pixels: Pixels) -> bool:
    return not any(np.may_share_memory(pixels, made.slots.pixels(slot, SHAPE)) for slot in range(made.slots.count))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("spare", [0, 1, 3])
def test_what_was_handed_out_is_never_written_over(spare: int, seed: int) -> None:
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


def test_pixels_are_copied_only_where_slots_run_short() -> None:
    made = lender(4, in_work=2)
    held = []
    for expected in (False, False, True, True):
        made.send()
        held.append(made.claim(SHAPE))
        assert is_copy(made, held[-1]) == expected
    del held[0]
    made.send()
    assert not is_copy(made, made.claim(SHAPE))


def test_a_batch_outlives_its_slots() -> None:
    made = lender(2, in_work=1)
    made.slots.pixels(made.send(), SHAPE)[:] = 7
    kept = torch.from_numpy(made.claim(SHAPE))
    del made
    assert (kept == 7).all()


def test_slots_are_apart_and_pickle_to_the_same_memory() -> None:
    slots = SharedSlots(3, 6)
    for slot in range(3):
        slots.pixels(slot, SHAPE)[:] = slot
    assert [slots.pixels(slot, (6,)).tolist() for slot in range(3)] == [[0] * 6, [1] * 6, [2] * 6]
    pickle.loads(pickle.dumps(slots)).pixels(1, SHAPE)[:] = 9
    assert slots.pixels(0, (18,)).tolist() == [0] * 6 + [9] * 6 + [2] * 6

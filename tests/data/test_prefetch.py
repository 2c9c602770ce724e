"""Prefetched shards: their order, their number, and faults that do not stop prefetching."""

import threading
import time
from collections.abc import Callable

from support.waiting import wait_until

from pipeline.data.prefetch import Prefetcher
from pipeline.errors import ShardError

USES = [(0, 4, 5), (0, 2, 3), (2, 3, 1), (3, 9, 4), (3, 4, 0), (9, 9, 2)]  # first step, last step, shard


def settled(fetched: list[int], expected: list[int]) -> bool:
    """True once `fetched` is `expected`, and stays so for a moment."""
    wait_until(lambda: fetched == expected)
    time.sleep(0.1)
    return fetched == expected


def ignore(shard: int) -> None:
    pass


def collect(fetched: list[int]) -> Callable[[int], bool]:
    def fetch(shard: int) -> bool:
        fetched.append(shard)
        return True

    return fetch


def test_prefetcher_fetches_in_order_up_to_ahead() -> None:
    fetched: list[int] = []
    with Prefetcher(collect(fetched), ignore, USES, 1) as prefetcher:
        assert settled(fetched, [5, 3, 1])
        prefetcher.begin(1)
        assert settled(fetched, [5, 3, 1])
        prefetcher.begin(2)
        assert settled(fetched, [5, 3, 1, 4])
        prefetcher.begin(3)
        assert settled(fetched, [5, 3, 1, 4, 0, 2])


def test_prefetcher_busy_shard_is_tried_again() -> None:
    fetched: list[int] = []
    busy = [3, 3]

    def fetch(shard: int) -> bool:
        if busy and shard == busy[0]:
            busy.pop()
            return False
        fetched.append(shard)
        return True

    with Prefetcher(fetch, ignore, USES, 0):
        assert settled(fetched, [5, 3])


def test_prefetcher_fault_is_ignored() -> None:
    fetched: list[int] = []

    def fetch(shard: int) -> bool:
        if shard == 5:
            raise ShardError("gone")
        fetched.append(shard)
        return True

    with Prefetcher(fetch, ignore, USES, 1):
        assert settled(fetched, [3, 1])


def test_prefetcher_exit_ends_thread() -> None:
    before = threading.active_count()
    with Prefetcher(lambda _: True, ignore, USES, 0):
        pass
    with Prefetcher(lambda _: False, ignore, USES, 9):
        pass
    with Prefetcher(lambda _: True, ignore, [], 9) as idle:
        idle.begin(3)
        assert threading.active_count() <= before + 2
    wait_until(lambda: threading.active_count() <= before)


def test_prefetcher_releases_each_shard_once() -> None:
    given_up: list[int] = []
    prefetcher = Prefetcher(lambda _: True, given_up.append, USES, 1)
    expected: list[set[int]] = [set(), set(), {3}, {1}, {5, 0}, set(), set(), set(), set(), {4, 2}]
    for step, shards in enumerate(expected):
        prefetcher.done(step)
        assert set(given_up) == shards
        given_up.clear()


def test_prefetcher_late_thread_skips_used_shards() -> None:
    """The shard may have been removed, and would be downloaded for no reader."""
    fetched: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def fetch(shard: int) -> bool:
        begun.set()
        assert go.wait(20)
        fetched.append(shard)
        return True

    with Prefetcher(fetch, ignore, USES, 1) as prefetcher:
        assert begun.wait(20)
        prefetcher.begin(3)
        go.set()
        assert settled(fetched, [5, 1, 4, 0, 2])  # 3 served until step 2

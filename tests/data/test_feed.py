"""Steps that are copied to a GPU in advance: order, number, faults, and the end of the thread."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.batch import batch
from support.waiting import wait_until

from pipeline.data.batch import ON_DEVICE, Batch
from pipeline.data.feed import CudaCopier, copy_ahead, feed
from pipeline.errors import ShardError

Step = list[Batch]


class Recorded:
    """A StepCopier that records its calls."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.threads: dict[str, set[int]] = {"start": set(), "finish": set()}

    def start(self, step: Step) -> Step:
        self.events.append(("start", step[0].group))
        self.threads["start"].add(threading.get_ident())
        return step

    def finish(self, step: Step) -> Step:
        self.events.append(("finish", step[0].group))
        self.threads["finish"].add(threading.get_ident())
        return step


def steps(count: int) -> Iterator[Step]:
    made = batch()
    for number in range(count):
        yield [Batch(**{**vars(made), "group": number})]


def test_copy_ahead_copies_one_step_in_advance() -> None:
    copies = Recorded()
    fed = copy_ahead(steps(4), copies)
    for number in range(3):
        (made,) = next(fed)
        assert made.group == number
        wait_until(lambda next=("start", number + 1): next in copies.events)  # while this one is in work
        time.sleep(0.05)
        assert ("start", number + 2) not in copies.events
    assert [made[0].group for made in fed] == [3]
    assert copies.threads["finish"] == {threading.get_ident()}, "the consumer's stream must do the waiting"
    assert threading.get_ident() not in copies.threads["start"]


def test_copy_ahead_fault_is_raised_in_order() -> None:
    def broken() -> Iterator[Step]:
        yield from steps(2)
        raise ShardError("cannot read shard 7")

    fed = copy_ahead(broken(), Recorded())
    assert [next(fed)[0].group, next(fed)[0].group] == [0, 1]
    with pytest.raises(ShardError, match="shard 7"):
        next(fed)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_copy_ahead_closed_early_ends_thread(taken: int) -> None:
    before = threading.active_count()
    fed = copy_ahead(steps(100), Recorded())
    for _ in range(taken):
        next(fed)
    fed.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before


def test_feed_cpu_yields_same_steps() -> None:
    before = threading.active_count()
    fed = feed(steps(3), torch.device("cpu"))
    assert next(fed)[0].images.dtype == torch.uint8
    assert threading.active_count() <= before
    assert [step[0].group for step in fed] == [1, 2]


class FakeStream:
    """A CUDA stream as `CudaCopier` uses it."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def record_event(self) -> str:
        self.log.append("recorded")
        return f"event {self.log.count('recorded')}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"waits for {event}")


class FakeContext:
    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def __enter__(self) -> None:
        self.log.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.log.append(f"leave {self.name}")


def test_cuda_copier_order_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies run on the side stream; the consumer's stream waits for their event and is recorded for the tensors."""
    log: list[Any] = []
    side, current = FakeStream(log), FakeStream(log)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "device", lambda device: FakeContext(log, "device"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: FakeContext(log, "side stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(Batch, "pin_memory", lambda self: log.append("pin") or self)
    monkeypatch.setattr(Batch, "copy_to", lambda self, device: log.append(f"copy to {device}") or self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(("used by", stream)))
    copies = CudaCopier(torch.device("cuda", 0))
    first, second = copies.start(next(steps(1))), copies.start(next(steps(1)))
    once = [
        "enter device",
        "enter side stream",
        "pin",
        "copy to cuda:0",
        "recorded",
        "leave side stream",
        "leave device",
    ]
    assert log == once * 2
    log.clear()
    copies.finish(first)
    assert log == ["waits for event 1", *[("used by", current)] * len(ON_DEVICE)]
    log.clear()
    copies.finish(second)
    assert log[0] == "waits for event 2"


@pytest.mark.gpu
def test_feed_gpu_yields_equal_steps() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda", 0)
    expected = batch().to(torch.device("cpu"))
    for number, step in enumerate(feed(steps(50), device)):
        (made,) = step
        assert made.group == number
        assert {getattr(made, name).device for name in ON_DEVICE} == {device}
        assert made.images.dtype == torch.uint8
        torch.cuda._sleep(1_000_000)  # the engine's work, while the next step is copied
        used = made.to(device)
        torch.testing.assert_close(used.images.cpu(), expected.images)
        assert torch.equal(used.boxes_cxcywh.cpu(), expected.boxes_cxcywh)

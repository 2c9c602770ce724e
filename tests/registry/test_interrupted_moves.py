"""A move of an alias that was stopped after any of its requests: the next command goes on from what was true then.

Two moves in a row are interrupted, each at every request, by Ctrl-C, by a kill, or by an error of a store that has
written nevertheless.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from support.alias_registry import NAME, Registry

from pipeline.registry.aliases import CHAMPION, PREVIOUS, move_alias, read_previous

Fault = Literal["stopped before", "stopped after", "killed before", "killed after", "lost answer"]
FAULTS: tuple[Fault, ...] = ("stopped before", "stopped after", "killed before", "killed after", "lost answer")


class KilledError(BaseException):
    """SIGKILL: nothing of the process is run any more."""


@dataclass
class Client:
    """The registry as a process sees it that is interrupted at request number `at`."""

    registry: Registry
    at: int = -1
    fault: Fault = "stopped before"
    requests: int = 0
    killed: bool = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.registry, name)

        def ask(*arguments: Any) -> Any:
            if self.killed:
                raise KilledError
            now = self.requests == self.at
            self.requests += 1
            if now and self.fault.endswith("before"):
                self._fail()
            answer = method(*arguments)
            if now:
                self._fail()
            return answer

        return ask

    def _fail(self) -> None:
        self.killed = self.fault.startswith("killed")
        raise KilledError if self.killed else ConnectionError if self.fault == "lost answer" else KeyboardInterrupt


@dataclass
class Truth:
    """What a user knows: the version in use, and the one before."""

    registry: Registry
    champion: str
    previous: str | None

    def move(self, version: str, at: int = -1, fault: Fault = "stopped before") -> bool:
        """Move the alias; whether that was not interrupted. What is true then must be found in the registry."""
        client: Any = Client(self.registry, at, fault)
        try:
            answer = move_alias(client, NAME, CHAMPION, version, self.champion, self.registry.pace)
            assert answer is None
            whole = True
        except (KeyboardInterrupt, KilledError, ConnectionError):
            whole = False
        if self.registry.aliases[CHAMPION] != self.champion:
            assert self.registry.aliases[CHAMPION] == version
            self.champion, self.previous = version, self.champion
        model: Any = SimpleNamespace(aliases=self.registry.aliases, tags=self.registry.tags)
        assert read_previous(model, CHAMPION) == self.previous
        return whole


def start(previous: str | None) -> Truth:
    registry = Registry("1")
    registry.pace = replace(registry.pace, settle=20)  # fewer requests while it waits
    if previous is not None:
        registry.aliases[PREVIOUS] = previous
    return Truth(registry, "1", previous)


def requests_of_a_move(after_a_killed_one: bool) -> int:
    truth = start("0")
    if after_a_killed_one:
        truth.move("2", 4, "killed after")
    client: Any = Client(truth.registry)
    assert move_alias(client, NAME, CHAMPION, "3", truth.champion, truth.registry.pace) is None
    return int(client.requests)


FIRST = tuple(product(range(requests_of_a_move(False)), FAULTS))
LATER = tuple(product(range(requests_of_a_move(True)), FAULTS))


@pytest.mark.parametrize("previous", ["0", None])
def test_move_alias_interrupted_twice_leaves_what_the_next_promotion_and_rollback_need(previous: str | None) -> None:
    states = set()
    for (at, fault), (again, other) in product(FIRST, LATER):
        truth = start(previous)
        truth.move("2", at, fault)
        states.add((truth.champion, truth.registry.aliases.get(PREVIOUS)))
        if truth.move("3", again, other):
            assert truth.registry.aliases == {CHAMPION: "3", PREVIOUS: truth.previous}
        before = truth.champion
        assert truth.move("4"), "a promotion"
        assert truth.registry.aliases == {CHAMPION: "4", PREVIOUS: before}
        assert truth.move(before), "a rollback"
        assert truth.registry.aliases == {CHAMPION: before, PREVIOUS: "4"}
    assert ("2", previous) in states, "a process was killed between the two writes"


@pytest.mark.parametrize("previous", ["0", None])
def test_move_alias_interrupted_rollback_leaves_what_the_next_one_needs(previous: str | None) -> None:
    for at, fault in FIRST:
        truth = start(previous)
        truth.move("2", at, fault)
        if truth.previous is None:
            continue
        back, forth = truth.previous, truth.champion
        truth.move(back, at, fault)
        if truth.champion == forth:
            assert truth.move(back)
        assert (truth.champion, truth.previous) == (back, forth)


def test_move_alias_stopped_by_ctrl_c_repairs_previous_itself() -> None:
    """Other programs read the alias `previous`, not the claim."""
    for at, fault in FIRST:
        if fault.startswith("killed"):
            continue
        truth = start("0")
        truth.move("2", at, fault)
        assert truth.registry.aliases[PREVIOUS] == truth.previous or _is_claimed(truth), (at, fault)


def _is_claimed(truth: Truth) -> bool:
    """Whether it was stopped a second time, in its own repair."""
    (tag,) = truth.registry.tags.values()
    return not json.loads(tag)["done"]

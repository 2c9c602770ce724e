"""Moves of an alias: exactly one of several succeeds, whatever happens between two of its requests."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from support.alias_registry import NAME, Registry

from pipeline.registry.aliases import CHAMPION, MOVE_TAG, Move, Pace, move_alias, previous_alias
from pipeline.tracking.client import connect

TAG = f"{MOVE_TAG}{CHAMPION}"


def requests_of_a_move() -> int:
    registry = Registry()
    assert registry.move("2", "1") is None
    return registry.requests


def test_move_alias_points_it_and_keeps_the_version_before() -> None:
    registry = Registry()
    assert registry.move("2", "1") is None
    assert registry.aliases == {"champion": "2", "previous": "1"}
    assert registry.newest is not None
    assert (registry.newest.version, registry.newest.before, registry.newest.done) == ("2", "1", True)
    assert registry.move("1", "2") is None, "a rollback is a move"
    assert registry.aliases == {"champion": "1", "previous": "2"}


def test_move_alias_first_one_has_no_previous() -> None:
    registry = Registry(champion=None)
    assert registry.move("1", None) is None
    assert registry.aliases == {"champion": "1"}
    assert previous_alias("production") == "previous-production"


@pytest.mark.parametrize("expected", ["1", None])
def test_move_alias_other_incumbent_is_named_and_stays(expected: str | None) -> None:
    registry = Registry("7")
    loss = registry.move("2", expected)
    assert loss is not None
    assert "7" in loss
    assert registry.aliases == {"champion": "7"}
    assert registry.tags == {}, "the claim is gone"


def test_move_alias_loser_is_told_who_won() -> None:
    registry = Registry()
    registry.move("2", "1")
    won = registry.newest
    loss = registry.move("3", "1")
    assert won is not None
    assert loss == won.shown
    assert won.by in loss
    assert registry.newest == won, "the record of the winner stays"


@pytest.mark.parametrize("at", range(requests_of_a_move() + 1))
def test_move_alias_suspended_before_any_request_leaves_one_winner(at: int) -> None:
    """A whole other move takes place meanwhile, for which the claim of the first one has expired."""
    registry = Registry()
    answers: list[str | None] = []
    registry.at, registry.before = at, lambda: answers.append(registry.move("3", "1"))
    answers.append(registry.move("2", "1"))
    if len(answers) == 1:  # the first move needs fewer requests
        registry.at = -1
        answers.insert(0, registry.move("3", "1"))
    other, first = answers
    assert (first is None) != (other is None), answers
    winner, loss = ("2", other) if first is None else ("3", first)
    assert registry.aliases == {"champion": winner, "previous": "1"}
    assert loss is not None
    assert f"version {winner}" in loss
    newest = registry.newest  # none if a late claim has overwritten it
    assert newest is None or (newest.version, newest.done) == (winner, True)


@pytest.mark.parametrize("at", range(requests_of_a_move() + 1))
def test_move_alias_foreign_write_is_never_reported_as_a_success(at: int) -> None:
    """As MLflow's pages do, without a claim."""
    registry = Registry()

    def write() -> None:
        registry.aliases[CHAMPION] = "9"

    registry.at, registry.before = at, write
    answer = registry.move("2", "1")
    if registry.aliases[CHAMPION] == "9":
        after = at >= requests_of_a_move() - 2  # after its last look at the alias
        assert after or (answer is not None and "9" in answer)
    else:
        assert answer is None
        assert registry.aliases[CHAMPION] == "2"


@pytest.mark.parametrize("fails", range(requests_of_a_move()))
def test_move_alias_after_a_killed_one_succeeds(fails: int) -> None:
    registry = Registry()

    def kill() -> None:
        registry.before = lambda: None
        raise KeyboardInterrupt

    registry.at, registry.before = fails, kill
    try:
        registry.move("2", "1")
    except KeyboardInterrupt:
        assert registry.aliases[CHAMPION] in ("1", "2")
    holder, start = registry.aliases[CHAMPION], registry.time
    registry.at = -1
    assert registry.move("3", holder) is None
    assert registry.aliases == {"champion": "3", "previous": holder}
    releasing = fails >= requests_of_a_move() - 2  # then the claim must expire
    assert releasing or registry.time - start < registry.pace.stale, "Ctrl-C leaves no claim"


def test_move_alias_suspended_between_its_writes_leaves_previous_to_the_later_moves() -> None:
    """Two whole moves take place before it goes on, for which its claim has expired."""
    registry = Registry()

    def others() -> None:
        assert registry.move("3", "2") is None
        assert registry.move("4", "3") is None

    registry.at, registry.before = requests_of_a_move() - 4, others  # before it writes `previous`
    loss = registry.move("2", "1")
    assert registry.aliases == {"champion": "4", "previous": "3"}
    assert loss is not None
    assert "version 4" in loss


def test_move_alias_dead_claim_expires_and_a_live_one_is_waited_for() -> None:
    registry = Registry()
    registry.tags[TAG] = json.dumps(vars(Move("dead", "5", "1", "somebody@host", "2026-01-01T00:00:00Z")))
    assert registry.move("2", "1") is None
    assert registry.pace.stale < registry.time < 2 * registry.pace.stale


def test_move_alias_refused_claim_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first claims at once: MLflow's database takes one row and refuses the other."""
    registry, write, refusals = Registry(), Registry.set_registered_model_tag, [1]

    def refuse(self: Registry, name: str, key: str, value: str) -> None:
        if refusals and refusals.pop():
            raise MlflowException("UNIQUE constraint failed")
        write(self, name, key, value)

    monkeypatch.setattr(Registry, "set_registered_model_tag", refuse)
    assert registry.move("2", "1") is None
    refusals[:] = [1] * 100
    with pytest.raises(MlflowException, match="UNIQUE"):
        registry.move("3", "2")


def test_move_alias_claim_that_was_written_in_spite_of_an_error_waits_for_slower_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry, write, errors = Registry(), Registry.set_registered_model_tag, [1]
    times: list[float] = []

    def answer_badly(self: Registry, name: str, key: str, value: str) -> None:
        write(self, name, key, value)
        times.append(self.time)
        if errors and errors.pop():
            raise MlflowException("the answer was lost")

    monkeypatch.setattr(Registry, "set_registered_model_tag", answer_badly)
    assert registry.move("2", "1") is None
    assert times[1] - times[0] >= registry.pace.settle, "the release comes after the wait"


@pytest.mark.parametrize("text", ["", "null", "[]", '{"id": "x"}'])
def test_read_move_foreign_tag_counts_as_none(text: str) -> None:
    registry = Registry()
    registry.tags[TAG] = text
    assert registry.newest is None
    assert registry.move("2", "1") is None


def test_move_alias_four_at_once_in_a_real_store_leave_one_winner(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client: Any = connect(uri, create=True)
    client.create_registered_model(NAME)
    for _ in range(5):
        client.create_model_version(NAME, source=tmp_path.as_uri())
    client.set_registered_model_alias(NAME, CHAMPION, "1")
    start = threading.Barrier(4)
    answers: dict[str, str | None] = {}

    def promote(version: str) -> Callable[[], None]:
        def run() -> None:
            own = connect(uri)
            start.wait()
            answers[version] = move_alias(own, NAME, CHAMPION, version, "1", Pace(settle=2, stale=30))

        return run

    threads = [threading.Thread(target=promote(version)) for version in "2345"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [version for version, loss in answers.items() if loss is None]
    assert {str(found) for found in client.get_registered_model(NAME).aliases.values()} == {winner, "1"}
    assert all(f"version {winner}" in (loss or "") for version, loss in answers.items() if version != winner)

"""Moves an alias such as `champion` to another version, although several people may do it at the same time.

MLflow's registry has no compare-and-set: the last write of an alias wins, unseen by the others. So a move first writes
who it is into a tag of the registered model, waits, and continues only if the tag still names it (Fischer's timed
mutual exclusion; L. Lamport, A Fast Mutual Exclusion Algorithm, 1987). Then it reads the alias again, writes, and reads
a second time.

What this promises: of several moves away from the same version exactly one succeeds, and the others learn who did, as
long as a write of the claim reaches the store within `Pace.settle` of the read before it. A slower write is noticed by
its writer, who then waits `Pace.stale`. A process that was suspended for longer than that finds that its claim is gone
and restores what it has overwritten. What it cannot promise: MLflow's pages and `jobs.register --alias` take no part.
Their write before the second read is noticed; later ones win as always.

Raises whatever MLflow raises; a claim that is left behind expires.
"""

import contextlib
import getpass
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from pipeline.logs import get_logger
from pipeline.tracking.api import RegisteredModel, TrackingClient

CHAMPION, PREVIOUS = "champion", "previous"
MAX_REFUSALS = 5  # of the write of a claim
MOVE_TAG = "promotion/"  # and the alias: the newest move, or the one that is running

log = get_logger("registry")


@dataclass(frozen=True)
class Pace:
    """How long a move waits, in seconds."""

    settle: float = 2.0  # longest time from reading that nobody moves the alias to having written a claim
    stale: float = 60.0  # a claim that is unchanged for so long belongs to a dead process
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class Move:
    """The newest move of an alias, as JSON in a tag of the registered model."""

    id: str
    version: str  # that the alias goes to
    before: str  # the version that had it; empty if none
    by: str  # user and machine
    at: str  # UTC
    done: bool = False

    @property
    def shown(self) -> str:
        """For messages."""
        return f"version {self.version} ({self.by}, {self.at})"


def previous_alias(alias: str) -> str:
    """The alias of the version that had `alias` before."""
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"


def move_alias(
    client: TrackingClient, name: str, alias: str, version: str, expected: str | None, pace: Pace | None = None
) -> str | None:
    """Point `alias` at `version`, and `previous_alias(alias)` at the version that had it.

    Args:
        client: of the store.
        name: registered model.
        alias: that moves.
        version: that gets it.
        expected: the version that has it, with which `version` was compared; None if no version has it.
        pace: for tests.

    Returns:
        None if it was moved; else who has it instead, for a message, and nothing was changed.
    """
    pace = pace or Pace()
    mine = Move(uuid.uuid4().hex, version, expected or "", who(), now())
    replaced: Move | None = None
    winner: str | None = None
    moved = False
    try:
        replaced = _claim(client, name, alias, mine, pace)
        winner = _winner(client.get_registered_model(name), alias, expected, replaced)
        if winner is None:
            if expected is not None:
                client.set_registered_model_alias(name, previous_alias(alias), expected)
            client.set_registered_model_alias(name, alias, version)
            winner = _check_moved(client, name, alias, mine, replaced, pace)
            moved = winner is None
    finally:
        with contextlib.suppress(Exception):  # the alias has its end; a claim that stays expires
            _release(client, name, alias, replace(mine, done=True) if moved else replaced, mine, moved)
    return winner


def read_move(model: RegisteredModel, alias: str) -> Move | None:
    """The newest move of an alias; None if there was none, or its tag is not of this form."""
    try:
        return Move(**json.loads(model.tags[f"{MOVE_TAG}{alias}"]))
    except (KeyError, ValueError, TypeError):
        return None


def who() -> str:
    """User and machine, as the tags name them."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may have neither a name nor an entry for its user
        user = str(os.getuid())
    return f"{user}@{os.uname().nodename}"


def now() -> str:
    """The time in UTC to seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _claim(client: TrackingClient, name: str, alias: str, mine: Move, pace: Pace) -> Move | None:
    """Wait until no other move runs and the tag names this one; returns what it named before."""
    from mlflow.exceptions import MlflowException

    replaced: Move | None = None
    seen, since = "", pace.clock()
    refusals = 0
    while True:
        asked = pace.clock()
        holder = read_move(client.get_registered_model(name), alias)
        if holder is not None and holder.id == mine.id:
            return replaced
        if holder is None or holder.done or (holder.id == seen and asked - since > pace.stale):
            replaced = holder if holder is not None and holder.done else None
            try:
                _write(client, name, alias, mine)
            except MlflowException:  # MLflow's databases refuse one of two first writes of a tag at the same time
                refusals += 1
                if refusals > MAX_REFUSALS or pace.clock() - asked >= pace.settle:
                    raise
            # Also after an error: the write may have reached the store.
            pace.sleep(pace.settle if pace.clock() - asked < pace.settle else pace.stale)
            continue
        if holder.id != seen:
            seen, since = holder.id, asked
            log.info("models:/%s@%s: waiting for the move to %s", name, alias, holder.shown)
        pace.sleep(pace.settle / 4)


def _winner(model: RegisteredModel, alias: str, expected: str | None, newest: Move | None) -> str | None:
    """Who has the alias, if it is not `expected`."""
    holder = _holder(model, alias)
    if holder == expected:
        return None
    if holder is None:
        return "nobody (the alias was deleted)"
    return newest.shown if newest is not None and newest.version == holder else f"version {holder}"


def _check_moved(
    client: TrackingClient, name: str, alias: str, mine: Move, replaced: Move | None, pace: Pace
) -> str | None:
    """Who has the alias instead, after this process has written it."""
    known = (mine.id, replaced.id if replaced else mine.id)
    since = pace.clock()
    while True:
        model = client.get_registered_model(name)
        newest = read_move(model, alias)
        foreign = newest if newest is not None and newest.id not in known else None
        if foreign is None or foreign.done or pace.clock() - since > 2 * pace.stale:
            break
        pace.sleep(pace.settle / 4)  # the claim of this process had expired; what the other one does decides
    if foreign is not None and foreign.done and _holder(model, alias) == mine.version != foreign.version:
        client.set_registered_model_alias(name, alias, foreign.version)  # it had moved the alias before
        return foreign.shown
    return _winner(model, alias, mine.version, newest)


def _release(client: TrackingClient, name: str, alias: str, record: Move | None, mine: Move, moved: bool) -> None:
    newest = read_move(client.get_registered_model(name), alias)
    if not moved and (newest is None or newest.id != mine.id):
        return
    if record is None:
        client.delete_registered_model_tag(name, f"{MOVE_TAG}{alias}")
    else:
        _write(client, name, alias, record)


def _write(client: TrackingClient, name: str, alias: str, move: Move) -> None:
    client.set_registered_model_tag(name, f"{MOVE_TAG}{alias}", json.dumps(asdict(move)))


def _holder(model: RegisteredModel, alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)

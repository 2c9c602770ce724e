"""Moves an alias such as `champion` to another version, although several people may do it at the same time.

MLflow's registry has no compare-and-set: the last write of an alias wins, unseen by the others. So a move first writes
who it is into a tag of the registered model, waits, and continues only if the tag still names it (Fischer's timed
mutual exclusion; L. Lamport, A Fast Mutual Exclusion Algorithm, 1987). Then it reads the alias again, writes, and reads
a second time.

What this promises: of several moves away from the same version exactly one succeeds, and the others learn who did, as
long as a write of the claim reaches the store within `Pace.settle` of the read before it. A slower write is noticed by
its writer, who then waits `Pace.stale`. A process that was suspended for longer than that finds that its claim is gone
and restores what it has overwritten. What it cannot promise: MLflow's pages take no part. Their write before
the second read is noticed; later ones win as always.

A move is two writes, the alias and `previous`. A process may be stopped between any two requests, so the claim that it
leaves says what `previous` has to be: `read_previous` follows it, and the next move writes it before it begins. Ctrl-C
does so at once.

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

from pipeline.config.names import PREVIOUS
from pipeline.logs import get_logger
from pipeline.tracking.api import RegisteredModel, TrackingClient

CHAMPION = "champion"
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
    previous: str = ""  # that `previous` has to be until the alias moves; empty if it is so

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
    writes = moved = False
    try:
        mine, replaced, winner = _claim(client, name, alias, mine, expected, pace)
        if winner is not None:
            return winner
        if mine.previous:  # a killed process has not written it
            client.set_registered_model_alias(name, previous_alias(alias), mine.previous)
        winner = _winner(client.get_registered_model(name), alias, expected, replaced)
        if winner is None:
            writes = True
            client.set_registered_model_alias(name, alias, version)
            if expected is not None:
                client.set_registered_model_alias(name, previous_alias(alias), expected)
            winner = _check_moved(client, name, alias, mine, replaced, pace)
            moved = winner is None
    finally:
        with contextlib.suppress(Exception):  # a claim that stays expires, and the next move does what is left
            _release(client, name, alias, mine, replaced, writes, moved)
    return winner


def read_previous(model: RegisteredModel, alias: str) -> str | None:
    """The version that had `alias` before; None if there is none.

    It is what `previous_alias(alias)` points at, unless a process was killed in a move of the alias.
    """
    move, holder = read_move(model, alias), _holder(model, alias)
    if move is not None and not move.done:
        if holder == move.version and move.before:
            return move.before
        if holder != move.version and move.previous:
            return move.previous
    return _holder(model, previous_alias(alias))


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


def _claim(
    client: TrackingClient, name: str, alias: str, mine: Move, expected: str | None, pace: Pace
) -> tuple[Move, Move | None, str | None]:
    """Wait until no other move runs and the tag names this one.

    Returns:
        The move as the tag has it; what the tag named before; who has the alias if it is not `expected`, and then
        nothing was written: a claim says of the alias that it is still to move.
    """
    from mlflow.exceptions import MlflowException

    replaced: Move | None = None
    seen, since = "", pace.clock()
    refusals = 0
    while True:
        asked = pace.clock()
        model = client.get_registered_model(name)
        holder = read_move(model, alias)
        if holder is not None and holder.id == mine.id:
            return mine, replaced, None
        if holder is None or holder.done or (holder.id == seen and asked - since > pace.stale):
            replaced = holder if holder is not None and holder.done else None
            if winner := _winner(model, alias, expected, replaced):
                return mine, replaced, winner
            mine = replace(mine, previous=_missing_previous(model, alias) or "")
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
    if foreign is not None and foreign.done and foreign.version != mine.version:  # it had moved the alias before
        if foreign.before and _holder(model, previous_alias(alias)) != foreign.before:
            client.set_registered_model_alias(name, previous_alias(alias), foreign.before)
        if _holder(model, alias) == mine.version:
            client.set_registered_model_alias(name, alias, foreign.version)
            return foreign.shown
    return _winner(model, alias, mine.version, newest)


def _release(
    client: TrackingClient, name: str, alias: str, mine: Move, replaced: Move | None, writes: bool, moved: bool
) -> None:
    """Give up the claim, with `previous` as it has to be.

    It is so after an error as well: the alias has moved, or it was not (`moved`) or may have been (`writes`) written.
    """
    model = client.get_registered_model(name)
    newest = read_move(model, alias)
    if newest is not None and newest.id == mine.id:
        moved = moved or (writes and _holder(model, alias) == mine.version)
        if previous := _missing_previous(model, alias):
            client.set_registered_model_alias(name, previous_alias(alias), previous)
    elif not moved:
        return
    if moved:
        _write(client, name, alias, replace(mine, done=True, previous=""))
    elif replaced is None:
        client.delete_registered_model_tag(name, f"{MOVE_TAG}{alias}")
    else:
        _write(client, name, alias, replaced)


def _missing_previous(model: RegisteredModel, alias: str) -> str | None:
    """What `previous` has to be, if it is not."""
    due = read_previous(model, alias)
    return None if due == _holder(model, previous_alias(alias)) else due


def _write(client: TrackingClient, name: str, alias: str, move: Move) -> None:
    content = asdict(move)
    if not move.previous:  # earlier versions of this code do not read it
        del content["previous"]
    client.set_registered_model_tag(name, f"{MOVE_TAG}{alias}", json.dumps(content))


def _holder(model: RegisteredModel, alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)

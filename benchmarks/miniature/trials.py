"""The table of recorded trials, `benchmarks/results/tpe_trials.json`: real short trainings with random settings.

Trial n has the values that random search draws for point n. It counts as long as these values and the settings of all
trials are what they were. A file that is damaged or of another version is a RunError.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.miniature.replay import RecordedTrial
from benchmarks.miniature.results import changed_settings, current_commit, digest, identity, write_result
from benchmarks.miniature.training import Outcome
from pipeline.config import Config
from pipeline.errors import RunError
from tune.search.sampling import draw
from tune.space import Space

VERSION = 1
KEYS = {"number", "values", "AP"}

Table = dict[str, Any]  # `trials` by number; `settings` and `digest` of what all trials share


def read_table(path: Path) -> Table | None:
    """The recorded trials; None if there is no file. Raises RunError."""
    if not path.exists():
        return None
    try:
        table: Table = json.loads(path.read_bytes())
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']} instead of {VERSION}")
        if not isinstance(table["settings"], dict) or not all(trial.keys() >= KEYS for trial in table["trials"]):
            raise ValueError(f"settings, or one of {', '.join(sorted(KEYS))}, is missing")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not a table that this code reads ({error}); delete it to record again") from None
    return table


def trials_of(space: Space, table: Table | None) -> list[RecordedTrial]:
    """The trials that count, as the replay needs them."""
    if table is None or changed_settings(table, identity(space.base, {})):
        return []
    counting = (trial for trial in table["trials"] if trial["values"] == _values(space, trial["number"]))
    return [RecordedTrial(trial["values"], trial["AP"]) for trial in counting]


def record_trials(
    space: Space,
    data: Mapping[str, str],
    path: Path,
    count: int,
    train: Callable[[Config], Outcome],
    say: Callable[[str], None],
) -> Table:
    """Train every trial below `count` that the table lacks; the table is written after each. One that fails has AP 0.

    Args:
        space: what the values are drawn from; its base has `data.train` and `data.val`.
        data: digests of the shards.
        path: of the table.
        count: trials that the table shall have at least.
        train: one training.
        say: gets a line for each trial that is trained, and the reason if the table starts anew.
    """
    content = identity(space.base, data)
    table = read_table(path)
    if table and (changes := changed_settings(table, content)):
        say(f"all trials are recorded again, because {'; '.join(changes)}")
        table = None
    shared = {"version": VERSION, "digest": digest(content), "settings": content}
    commit = current_commit()
    known = {trial["number"]: trial for trial in (table or {}).get("trials", [])}
    kept = {number: trial for number, trial in known.items() if trial["values"] == _values(space, number)}
    for number in range(count):
        if number in kept:
            continue
        values = _values(space, number)
        try:
            outcome = train(space.config(values, f"trial-{number:03d}"))
        except RunError as error:  # it has learned nothing, and both samplers may propose it
            kept[number] = {"number": number, "values": values, "AP": 0.0, "error": str(error), "commit": commit}
        else:
            kept[number] = {
                "number": number,
                "values": values,
                **{name: value for name, value in outcome.final.items() if name != "epoch"},
                "loss": outcome.loss,
                "seconds": outcome.seconds,
                "commit": commit,
            }
        say(f"trial {number + 1} of {count}: AP {kept[number]['AP']:.3f} with {values}")
        write_result(path, {**shared, "trials": [kept[each] for each in sorted(kept)]})
    return {**shared, "trials": [kept[each] for each in sorted(kept)]}


def _values(space: Space, number: int) -> dict[str, Any]:
    """Those of a trial, as a JSON file gives them back."""
    values: dict[str, Any] = json.loads(json.dumps(draw(space, number)))
    return values

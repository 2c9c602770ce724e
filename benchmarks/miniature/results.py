"""Result files of units: one JSON file for each training, so that a command that was stopped goes on where it was.

A file counts for a unit if it was made with the same settings on the same data. Settings of this machine (where the
data and the backbone lie) do not matter. A file that is damaged or of another version is a RunError.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.miniature.training import Outcome
from pipeline.config import Config, flatten
from pipeline.config.compare import recipe_settings
from pipeline.errors import RunError
from pipeline.files.atomic import write_file

VERSION = 1

Recorded = dict[str, Any]


def identity(config: Config, data: Mapping[str, str]) -> dict[str, Any]:
    """What the outcome is a function of: the recipe, the seed, and the digests of splits and backbone by name."""
    settings = {"seed": config.seed, **recipe_settings(config), **{f"digest of {k}": v for k, v in data.items()}}
    del settings["model.backbone.weights"]  # a place of this machine; their digest stands beside it
    content: dict[str, Any] = json.loads(json.dumps(settings))
    return content


def digest(content: Mapping[str, Any]) -> str:
    """Short sha256 of an `identity`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def record(outcome: Outcome, content: Mapping[str, Any], commit: str, **names: Any) -> Recorded:
    """The content of a result file.

    Args:
        outcome: of the training.
        content: its `identity`.
        commit: of the code that has trained.
        **names: what the training is called, such as row and seed.
    """
    final = {key: value for key, value in outcome.final.items() if key != "epoch"}
    return {
        "version": VERSION,
        **names,
        "digest": digest(content),
        "commit": commit,
        **final,
        **{key: value for key, value in asdict(outcome).items() if key != "curve"},
        "curve": outcome.curve,
        "settings": dict(content),
    }


def changed_settings(recorded: Recorded, content: Mapping[str, Any]) -> list[str]:
    """What differs between a result and what would be trained now, for people; empty if the result counts.

    A setting that is newer than the result counts as changed only where it has not its default: the default of a new
    setting leaves runs as they were. One that no longer exists is not compared.
    """
    if recorded["digest"] == digest(content):
        return []
    before = {**flatten(Config()), **recorded["settings"]}
    return [
        f"{key} was {before.get(key)}, is {content[key]}"
        for key in content
        if json.dumps(before.get(key)) != json.dumps(content[key])
    ]


def read_result(path: Path) -> Recorded:
    """One result file. Raises RunError."""
    try:
        recorded: Recorded = json.loads(path.read_bytes())
        if recorded["version"] != VERSION or not {"digest", "settings", "curve", "AP"} <= recorded.keys():
            raise ValueError(f"version {recorded['version']} instead of {VERSION}, or keys are missing")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{path} is not a result that this code reads ({error}); delete it to train again") from None
    return recorded


def write_result(path: Path, recorded: Recorded) -> None:
    """Write one result file; a reader never sees half of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (format_json(recorded) + "\n").encode())


def format_json(content: Mapping[str, Any]) -> str:
    """JSON with one line per top-level key, and one per evaluation, so that a change is easy to see in a diff."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            inner = ",\n  ".join(json.dumps(each) for each in value)
            lines.append(f"{json.dumps(key)}: [\n  {inner}\n ]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}"


def current_commit() -> str:
    """The commit that is checked out, with + if tracked Python or YAML differs from it; unknown without git.

    To be called at the start of a process, which has the code of that moment.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", ":/*.py", ":/*.yaml")
    except OSError:  # no git
        return "unknown"
    return commit + ("+" if commit != "unknown" and changed else "")

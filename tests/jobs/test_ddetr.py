"""`ddetr`: it knows every command, lists them without loading anything, and hands words and exit codes through."""

import json
import subprocess
import sys

import pytest
from support.paths import ROOT

from jobs.ddetr import COMMANDS, run
from pipeline import __version__


def test_commands_are_all_entry_files() -> None:
    entries = {
        f"{path.parent.name}.{path.stem}"
        for folder in ("jobs", "tune")
        for path in (ROOT / folder).glob("*.py")
        if 'if __name__ == "__main__":' in path.read_text()
    }
    assert {module for module, _ in COMMANDS.values()} == entries
    assert all(name == module.partition(".")[2] for name, (module, _) in COMMANDS.items())
    assert len((ROOT / "jobs" / "ddetr.py").read_text().splitlines()) <= 80


def test_help_lists_every_command_and_loads_none() -> None:
    code = "import json, sys; from jobs.ddetr import run; run(['--help']); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *page, loaded = done.stdout.splitlines()
    assert [line.split()[0] for line in page if line.startswith("  ")] == list(COMMANDS)
    assert {name for name in json.loads(loaded) if name in ("torch", "numpy", "pydantic", "yaml")} == set()
    assert not {module for module, _ in COMMANDS.values()} & set(json.loads(loaded))


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--version"], 0), ([], 2), (["trainn"], 2)])
def test_words_without_a_command_end_with_a_code(
    argv: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == code
    out, err = capsys.readouterr()
    assert bool(err) == (code == 2)
    assert "'train'" in err if argv == ["trainn"] else "ddetr" in out + err
    assert argv != ["--version"] or out == f"ddetr {__version__}\n"


def test_command_gets_its_words_and_gives_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "demo", "optim.lr=fast", "--dry-run"]) == 2
    assert "optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["shard", "--help"], ["help", "shard"]])
def test_help_of_a_command_says_ddetr(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(argv)
    assert end.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: ddetr shard ")
    assert "python -m" not in page
    assert "jobs." not in page

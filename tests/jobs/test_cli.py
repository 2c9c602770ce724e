"""Every command: errors are text and an exit code, never a traceback, and `--help` shows an example."""

import argparse
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from jobs import train
from jobs.cli import CommandParser, add_config_arguments, main
from jobs.promote import REFUSED
from pipeline import errors
from pipeline.errors import ConfigError, NonFiniteError, PipelineError
from pipeline.runs.record import RunRecord, write_run
from tune import report

ENTRY_FILES = sorted(
    path
    for folder in ("jobs", "tune")
    for path in (ROOT / folder).glob("*.py")
    if 'if __name__ == "__main__":' in path.read_text()
)
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipelineError)]


@pytest.fixture
def parser() -> CommandParser:
    made = CommandParser("jobs.thing", "Does a thing.", "python -m jobs.thing c.yaml optim.lr=1e-4")
    add_config_arguments(made)
    return made


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def test_arguments_reach_run_in_any_order(parser: CommandParser) -> None:
    seen: list[argparse.Namespace] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 7

    for argv in (["c.yaml", "a=1", "--dry-run", "b=2"], ["--dry-run", "c.yaml", "a=1", "b=2"]):
        assert main(parser, run, argv) == 7
    assert [vars(args) for args in seen] == [{"config": "c.yaml", "overrides": ["a=1", "b=2"], "dry_run": True}] * 2


@pytest.mark.parametrize(("error", "code"), [(ConfigError("turn the knob"), 2), (NonFiniteError("lower the lr"), 1)])
def test_pipeline_errors_become_a_line_and_a_code(
    parser: CommandParser, error: PipelineError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(parser, raising(error), ["c.yaml"]) == code
    assert capsys.readouterr() == ("", f"error: {error}\n")


def test_ctrl_c_exits_130_without_a_traceback(parser: CommandParser, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(parser, raising(KeyboardInterrupt()), ["c.yaml"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_ctrl_c_ends_with_the_line_that_says_how_to_continue(
    parser: CommandParser, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(parser, raising(KeyboardInterrupt("use --resume")), ["c.yaml"]) == 130
    assert capsys.readouterr().err == "stopped: use --resume\n"


def test_train_stopped_by_ctrl_c_names_resume_if_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: object, **others: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.launch.preflight.check_run", lambda config, resume: None)
    monkeypatch.setattr("pipeline.launch.driver.train", stopped)
    (tmp_path / "c.yaml").write_text(f"name: mine\nstorage: {tmp_path}\n")
    for started in (False, True):
        if started:
            write_run(RunRecord("mine", str(tmp_path / "mine"), {}))
        assert main(train.build_parser(), train.run, [str(tmp_path / "c.yaml")]) == 130
        assert ("--resume" in capsys.readouterr().err.splitlines()[-1]) == started


@pytest.mark.parametrize(
    ("argv", "resume", "overrides"),
    [
        (["c.yaml", "--resume", "scaling.num_workers=1"], "must", ["scaling.num_workers=1"]),
        (["--resume", "c.yaml", "a=1"], "must", ["a=1"]),
        (["c.yaml", "a=1", "--resume"], "must", ["a=1"]),
        (["c.yaml", "--resume", "auto", "a=1"], "auto", ["a=1"]),
        (["c.yaml", "--resume", "automatic=1"], "must", ["automatic=1"]),
        (["c.yaml", "--resume=auto", "a=1"], "auto", ["a=1"]),
        (["c.yaml", "--resume", "--dry-run", "a=1"], "must", ["a=1"]),
        (["c.yaml", "a=1"], "no", ["a=1"]),
    ],
)
def test_flag_with_an_optional_value_takes_no_override(argv: list[str], resume: str, overrides: list[str]) -> None:
    args = train.build_parser().parse_intermixed_args(argv)
    assert (args.config, args.resume, args.overrides) == ("c.yaml", resume, overrides)


@pytest.mark.parametrize("path", ENTRY_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_optional_values_of_flags_are_choices_or_written_with_equals(path: Path) -> None:
    """`CommandParser` takes the next word only if it is a choice; any other value needs the form in help."""
    parser = importlib.import_module(f"{path.parent.name}.{path.stem}").build_parser()
    for action in parser._actions:
        if action.option_strings and action.nargs in ("?", "*"):
            assert action.choices or f"{action.option_strings[-1]}={action.metavar}" in (action.help or "")


def test_main_bug_keeps_its_traceback(parser: CommandParser) -> None:
    with pytest.raises(ZeroDivisionError):
        main(parser, raising(ZeroDivisionError()), ["c.yaml"])


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["c.yaml", "--optim.lr", "1e-4"], "settings are written key=value"),
        (["c.yaml", "--dry"], "settings are written key=value"),  # flags are not guessed from their beginning
        (["c.yaml", "--dri-run=1"], "did you mean --dry-run?\nsettings"),
        ([], "the following arguments are required: CONFIG\n"),
    ],
)
def test_wrong_usage_exits_2_with_a_hint(
    parser: CommandParser, argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(parser, raising(AssertionError()), argv)
    assert raised.value.code == 2
    assert hint in capsys.readouterr().err


def test_word_after_a_flag_with_an_optional_value_exits_2_and_shows_its_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(report.build_parser(), raising(AssertionError()), ["runs/sweep", "--register", "my-detector"])
    assert raised.value.code == 2
    assert "my-detector\na flag's value that may be left out is written --register=NAME\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_names_an_exit_code_and_pickles(kind: type[PipelineError]) -> None:
    again: Any = pickle.loads(pickle.dumps(kind("fix it")))
    assert (type(again), str(again)) == (kind, "fix it")
    assert kind.exit_code in (1, 2, 75)
    assert kind.__doc__


def test_page_of_the_documents_has_every_exit_code() -> None:
    section = (ROOT / "docs/operations.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    from_jobs = {int(code) for path in ENTRY_FILES for code in re.findall(r"return (\d+)", path.read_text())}
    from_cli = {int(code) for code in re.findall(r"return (\d+)", (ROOT / "jobs/cli.py").read_text())}
    assert codes == {0, REFUSED, *from_jobs, *from_cli, *(kind.exit_code for kind in ERRORS)}


@pytest.mark.parametrize("path", ENTRY_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_entry_files_are_short_and_end_alike(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert lines[-1].strip() == "sys.exit(main(build_parser(), run))"


def test_help_of_every_command_shows_an_example() -> None:
    modules = [f"{path.parent.name}.{path.stem}" for path in ENTRY_FILES]
    assert {"jobs.train", "jobs.shard", "jobs.evaluate"} <= set(modules)
    code = (
        "import importlib\n"
        f"for name in {modules!r}:\n"
        "    print(f'# {name}')\n"
        "    print(importlib.import_module(name).build_parser().format_help())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    pages = dict(page.split("\n", 1) for page in done.stdout.split("# ")[1:])
    assert set(pages) == set(modules)
    for module, page in pages.items():
        assert page.startswith(f"usage: python -m {module}")
        assert f"python -m {module}" in page.partition("example:")[2]


def test_main_closed_pipe_exits_141() -> None:
    """As in `python -m jobs.shard info FOLDER | head -1`."""
    code = (
        "import sys\n"
        "from jobs.cli import CommandParser, main\n"
        "sys.stdin.read()\n"
        "sys.exit(main(CommandParser('x', '', ''), lambda args: print('y' * 100) or 0, []))"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate("")
    assert (process.returncode, errors) == (141, "")


def test_set_up_logging_shows_the_project_and_warnings_of_others_without_routine() -> None:
    code = """
import logging
from jobs.cli import set_up_logging
set_up_logging()
logging.getLogger("pipeline.launch.driver").info("ours")
logging.getLogger("alembic.runtime").info("theirs")
logging.getLogger("alembic.runtime").warning("their warning")
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU ...")
logging.getLogger("DeepSpeed").warning("something else")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.rpartition(": ")[2] for line in done.stderr.splitlines()] == [
        "ours",
        "their warning",
        "something else",
    ]


def test_main_full_disk_exits_1_with_a_message() -> None:
    code = "import sys\nfrom jobs.cli import CommandParser, main\n"
    code += "sys.exit(main(CommandParser('x', 'x', 'x'), lambda args: print('y' * 100000) or 0, []))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the disk is full")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr

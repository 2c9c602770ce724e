"""Common parts of all commands: argument order, error text, exit codes, Ctrl-C.

A command is `build_parser() -> ArgumentParser` and `run(args) -> int`, which `main` combines. Settings are `key=value`
overrides of the config, never flags; the few flags control the command itself.
"""

import argparse
import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from jobs.presets import CONFIG_HELP
from pipeline.errors import PipelineError
from pipeline.files.credentials import redact
from pipeline.launch.ray_internals import ROUTINE_LOGGER

Parser = argparse.ArgumentParser
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
ROUTINE_LOGGERS = ("DeepSpeed", ROUTINE_LOGGER)
ROUTINE = ("Setting accelerator to CPU", "Token authentication is enabled")


class CommandParser(Parser):
    """An ArgumentParser that keeps the example's line breaks and answers `--key value` with the right form."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_intermixed_args(  # type: ignore[override]  # the same call, with one type of namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Like argparse, but a flag with an optional value uses the next word only if it is one of its choices.

        So `--resume name=x` is the flag and an override, and `--resume auto` is `--resume=auto`.
        """
        words = list(sys.argv[1:] if args is None else args)
        for action in self._actions:
            if action.nargs == "*":  # argparse would say of `key=value ...` that it is required
                action.required = False
        optional = {flag: action for action in self._actions if action.nargs == "?" for flag in action.option_strings}
        for number, word in enumerate(words):
            if word == "--":
                break
            following = words[number + 1 : number + 2]
            if word in optional and not (following and following[0] in (optional[word].choices or ())):
                words[number] = f"{word}={optional[word].const}"
        return super().parse_intermixed_args(words, namespace)

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn; exit() is one
        """Print the message with a hint on unknown flags and words: the nearest one, how values are written; exit 2."""
        hint = ""
        if "unrecognized arguments: --" in message:
            given = message.partition("arguments: ")[2].split()[0].partition("=")[0]
            if close := get_close_matches(given, self._option_string_actions, n=1):
                hint = f"\ndid you mean {close[0]}?"
            if any(action.dest == "overrides" for action in self._actions):
                hint += "\nsettings are written key=value, e.g. optim.lr=1e-4 (see --help for the flags there are)"
        elif "unrecognized arguments: " in message:  # perhaps the value of a flag, where it may be left out
            optional = [action for action in self._actions if action.option_strings and action.nargs == "?"]
            forms = [f"{action.option_strings[-1]}={action.metavar}" for action in optional if not action.choices]
            hint = f"\na flag's value that may be left out is written {', '.join(forms)}" if forms else ""
        self.exit(2, f"{self.prog}: {redact(message)}{hint}\n")


def add_config_arguments(parser: Parser) -> None:
    """Add `CONFIG key=value ...` and `--dry-run`; the help says where settings are explained."""
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. optim.lr=1e-4; see below")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, start nothing")
    parser.epilog = f"{parser.epilog}\nall settings, or those of a KEY such as optim:\n  python -m jobs.settings [KEY]"


def add_tracking_argument(parser: Parser, first: str = "") -> None:
    """Add `--tracking-uri`; the help names `first` as the default before the environment."""
    default = f"{first}MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db"
    parser.add_argument("--tracking-uri", metavar="URI", help=f"MLflow store (default: {default})")


def set_up_logging() -> None:
    """Show messages of this project from INFO on and of libraries from WARNING on, without two routine messages."""
    logging.basicConfig(format=LOG_FORMAT, datefmt="%H:%M:%S")  # the root logger's level is WARNING
    logging.getLogger("pipeline").setLevel(logging.INFO)
    for name in ROUTINE_LOGGERS:
        logging.getLogger(name).addFilter(_is_no_routine)


def _is_no_routine(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ROUTINE)


def main(parser: Parser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
    """Parse, run, and turn a PipelineError into its message and exit code; Ctrl-C exits 130.

    The text of a KeyboardInterrupt, if it has one, becomes the last line: it says how to continue.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the terminal cannot show must not be an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_intermixed_args(argv)
    set_up_logging()
    try:
        code = run(args)
        sys.stdout.flush()
        return code
    except PipelineError as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as error:
        print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter's last flush must not fail
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: the disk is full: {error}; free space there", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1

"""`ddetr COMMAND ...`: every command under one name, in whatever folder; `pip install` puts it beside `python`.

`ddetr train` is `python -m jobs.train`, `ddetr sweep` is `python -m tune.sweep`. An unknown command exits 2.
"""

import importlib
import re
import sys
from collections.abc import Sequence

from jobs.cli import CommandParser, main
from pipeline import __version__

# Listed here, so that `ddetr --help` imports none of them. In the order in which they are needed.
COMMANDS = {
    "doctor": ("jobs.doctor", "check the operator on this machine"),
    "demo": ("jobs.demo", "run every stage once, on a drawn data set"),
    "lint": ("jobs.lint", "show what is wrong or odd in a data set"),
    "shard": ("jobs.shard", "pack a data set into shards, verify and compare them"),
    "show": ("jobs.show", "look at images and boxes as stored and as trained, as a page"),
    "finetune": ("jobs.finetune", "from your own data set to a registered model, in one command"),
    "train": ("jobs.train", "train a detector, evaluate, track and register it"),
    "sweep": ("tune.sweep", "search settings; each trial is a training run"),
    "report": ("tune.report", "show what a sweep has found, as a page"),
    "evaluate": ("jobs.evaluate", "compute COCO AP of a run, a model or a results file"),
    "analyse": ("jobs.analyse", "say why AP is what it is, as a page; compare two models"),
    "register": ("jobs.register", "make a run a version of a registered model"),
    "promote": ("jobs.promote", "make a version the champion if it is better"),
    "models": ("jobs.models", "list registered models, versions, and where one comes from"),
    "predict": ("jobs.predict", "detect objects in images"),
    "serve": ("jobs.serve", "answer HTTP requests with detections, with a page"),
    "export": ("jobs.export", "write a model as ONNX or as a torch.export archive"),
    "weights": ("jobs.weights", "import published weights, export to their layout"),
    "settings": ("jobs.settings", "print every setting with its meaning"),
    "table": ("jobs.table", "list the presets with published and own figures"),
}
HELP = "\n".join(
    [
        "usage: ddetr COMMAND ...",
        "",
        "Train Deformable DETR from COCO annotations to a registered detector.",
        "",
        *(f"  {name:10}{summary}" for name, (_, summary) in COMMANDS.items()),
        "",
        "`ddetr COMMAND --help` shows a command's arguments and an example; `ddetr --version` the version.",
        "Configs that come with the package go by name: `ddetr train r50_deformable --dry-run`, `ddetr sweep demo`.",
    ]
)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names with the words after it; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and words[1:]:
        words = [*words[1:], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] == "--version":
        print(f"ddetr {__version__}")
        return 0
    if words[0] not in COMMANDS:
        from pipeline.config.suggest import nearest  # only now: it loads the whole package of the config

        hint = f"did you mean '{nearest(words[0], COMMANDS)}'? `ddetr --help` lists them"
        print(f"ddetr: there is no command '{words[0]}'; {hint}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[words[0]][0])
    return main(rename_program(module.build_parser()), module.run, words[1:])


def rename_program(parser: CommandParser) -> CommandParser:
    """The parser of a command, with texts that say `ddetr train` instead of `python -m jobs.train` and `jobs.train`."""
    module = re.compile(rf"(?:python -m )?(?:jobs|tune)\.({'|'.join(COMMANDS)})\b")
    parser.prog, parser.description, parser.epilog = (
        module.sub(r"ddetr \1", text or "") for text in (parser.prog, parser.description, parser.epilog)
    )
    return parser

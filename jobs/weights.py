"""Import weights of the published code or of Hugging Face as a run, export those of a run, list what can be had.

`import` makes a run for `jobs.evaluate`, `jobs.predict`, `jobs.register`, `jobs.export` and `model.init_from`. The
number of classes comes from the file; classes other than COCO's need data.val=SHARDS, which has their names. `list`
shows what `model.init_from` can take and where to get it; with FILE, what that file is.
"""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from jobs.presets import find_config
from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.files.outputs import check_output

PATHS = {"import": ("FILE", "CONFIG", "RUN"), "export": ("RUN|models:/NAME@ALIAS|FOLDER", "OUT.pth")}
EXAMPLE = """python -m jobs.weights list
  python -m jobs.weights import r50_deformable_detr.pth r50_deformable runs/published
  python -m jobs.weights export runs/mine mine.pth"""


def build_parser() -> Parser:
    """The command line."""
    forms = "\n".join(f"  {action:8}{' '.join(names)}" for action, names in (PATHS | {"list": ("[FILE...]",)}).items())
    parser = CommandParser("jobs.weights", f"{__doc__}\n{forms}", EXAMPLE)
    parser.add_argument("action", choices=[*PATHS, "list"])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="see above; then key=value for an import")
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the action and print the result."""
    if args.action == "list":
        from pipeline.model.weights.known import list_weights  # each branch imports only what it runs

        print("\n".join(list_weights(args.paths, "runs")))
        return 0
    names = PATHS[args.action]
    paths, overrides = args.paths[: len(names)], args.paths[len(names) :]
    if len(paths) != len(names) or (overrides and args.action == "export"):
        got = " ".join(args.paths) or "nothing"
        raise ConfigError(f"jobs.weights {args.action} takes {' '.join(names)}; got {got}")
    if args.action == "import":
        return import_file(paths, overrides)
    from pipeline.registry.exchange import export_weights
    from pipeline.registry.locate import checkpoint_folder

    out = Path(paths[1])
    with checkpoint_folder(paths[0], args.tracking_uri) as folder:
        check_output(out, [folder])
        keys = export_weights(folder, out)
    print(f"{paths[1]}: {keys} tensors in the published layout")
    return 0


def import_file(paths: list[str], overrides: list[str]) -> int:
    """Make a run from a file of weights; the model is the preset's, with the file's classes."""
    from pipeline.files.storage import make_absolute
    from pipeline.launch.preflight import make_paths_absolute
    from pipeline.model.weights.files import read_weights
    from pipeline.registry.exchange import class_settings, import_weights

    path, preset, out = paths[0], find_config(paths[1]), paths[2]
    file = read_weights(path)
    softmax = load_config(preset).model.class_head == "softmax"
    storage, _, name = make_absolute(out.rstrip("/")).rpartition("/")
    location = [f"name={name}", f"storage={storage}"]
    config = make_paths_absolute(load_config(preset, [*class_settings(file, softmax), *location, *overrides]))
    record = import_weights(file, config)
    print(f"run {record.name}: {record.folder} ({file.layout} layout, {config.model.classes} classes)")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))

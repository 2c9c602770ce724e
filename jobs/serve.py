"""`python -m jobs.serve`: a trained detector over HTTP, with a page to try it; replicas in Ray Serve."""

import argparse
import sys
from pathlib import Path

from jobs.cli import CommandParser, Parser, add_tracking_argument, main
from pipeline.config.serving import ServingConfig
from pipeline.files.outputs import check_output
from pipeline.serving.arguments import TOKEN, parse_settings

EXAMPLE = f"""python -m jobs.serve models:/deformable-detr-demo@champion --replicas 2
  curl -F image=@street.jpg http://127.0.0.1:8000/v1/predict
the token that clients must send is the variable {TOKEN}"""


def build_parser() -> Parser:
    """The command line; a flag for each field of ServingConfig."""
    parser = CommandParser("jobs.serve", "Serve a detector over HTTP: JSON, forms, and a page.", EXAMPLE)
    parser.add_argument(
        "model", metavar="RUN|models:/NAME@ALIAS|FOLDER", help="a run's best checkpoint, a version, a checkpoint"
    )
    for name, field in ServingConfig.model_fields.items():
        meaning = f"{' '.join((field.description or '').split())} ({field.default})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=meaning)
    parser.add_argument("--without-token", action="store_true", help="let other machines in without a token")
    parser.add_argument(
        "--write-config",
        type=Path,
        metavar="FILE",
        help="write a config for `serve deploy` on a cluster, serve nothing",
    )
    add_tracking_argument(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, then serve or write the config."""
    given = {name: value for name in ServingConfig.model_fields if (value := getattr(args, name)) is not None}
    settings = parse_settings(given)
    if args.write_config:
        check_output(args.write_config)
    from pipeline.serving.server import check_request, run_server, write_serve_config

    local = args.write_config is None
    arguments = check_request(args.model, settings, args.tracking_uri, args.without_token, local)
    if local:
        run_server(arguments)
    else:
        write_serve_config(arguments, args.write_config)
        print(f"wrote {args.write_config}; on the cluster: serve deploy {args.write_config}")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))

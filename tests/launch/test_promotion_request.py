"""Requests of `jobs.promote` that cannot be met are refused before anything is loaded."""

from dataclasses import replace

import pytest

from jobs.cli import main
from jobs.promote import build_parser, run
from pipeline.errors import InputError
from pipeline.launch.promotion_request import PromotionRequest, check_request

REQUEST = PromotionRequest("mine")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "a/b"}, "NAME"),
        ({"source": "a b"}, "--from"),
        ({"source": "latest"}, "--from"),
        ({"target": "v3"}, "--to"),
        ({"target": "3"}, "--to"),
        ({"target": "previous"}, "--to.*--rollback"),
        ({"target": "previous-production"}, "--to.*--rollback"),
        ({"metric": "val/mAP"}, "--metric"),
        ({"metric": "test/AP"}, "--metric"),
        ({"min_gain": float("nan")}, "--min-gain"),
        ({"min_gain": 2.0}, "--min-gain"),
        ({"no_class_below": -20.0}, "--no-class-below"),
        ({"draws": -1}, "--draws"),
        ({"force": True, "rollback": True}, "--rollback"),
        ({"rollback": True, "source": "7"}, "--from"),
        ({"force": True, "overrides": ("data.val=x",)}, "--force"),
        ({"rollback": True, "overrides": ("data.val=x",)}, "--rollback"),
        ({"overrides": ("optim.lr=1",)}, "optim.lr"),
        ({"overrides": ("evaluation.top_k=0",)}, "evaluation.top_k"),
    ],
)
def test_check_request_what_does_not_fit_is_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        check_request(replace(REQUEST, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"source": "7"},
        {"source": "previous"},
        {"metric": "AP_small"},
        {"min_gain": -1.0, "no_class_below": -1.0},
        {"draws": 0},
    ],
)
def test_check_request_what_fits_is_allowed(changes: dict[str, object]) -> None:
    check_request(replace(REQUEST, **changes))  # type: ignore[arg-type]


def test_command_reads_negative_limits_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mine", "data.val=a", "--no-class-below", "-0.5", "data.val=b", "--from", "7", "--to", "champion"]
    args = build_parser().parse_intermixed_args(words)
    assert (args.source, args.target, args.no_class_below) == ("7", "champion", -0.5)
    assert replace(REQUEST, overrides=args.overrides).shards == "b"
    assert main(build_parser(), run, ["mine", "--json", ""]) == 2
    assert main(build_parser(), run, ["mine", "--json", "/dev"]) == 2
    assert "/dev" in capsys.readouterr().err

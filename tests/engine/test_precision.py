"""fp16's loss scale as a function, and devices that cannot."""

import dataclasses
import itertools
import json

import pytest
import torch

from pipeline.config import Precision
from pipeline.engine import precision as module
from pipeline.engine.precision import LossScale, check_precision, initial_scale
from pipeline.errors import ConfigError


def test_initial_scale_exists_for_fp16_only() -> None:
    assert [initial_scale(p) is not None for p in ("fp32", "bf16", "fp16")] == [False, False, True]  # type: ignore[arg-type]


def test_loss_scale_overflow_halves_it_down_to_one() -> None:
    scale = LossScale()
    for _ in range(16):
        assert scale.can_shrink
        scale = scale.after(finite=False)
    assert scale.scale == 1
    assert not scale.can_shrink
    assert scale.after(finite=False).scale == 1


def test_loss_scale_2000_finite_steps_double_it() -> None:
    scale = LossScale(4.0)
    for _ in range(1999):
        scale = scale.after(finite=True)
    assert scale == LossScale(4.0, 1999)
    assert scale.after(finite=True) == LossScale(8.0, 0)
    assert scale.after(finite=False) == LossScale(2.0, 0)  # and the count starts again
    assert LossScale(2.0**24, 1999).after(finite=True).scale == 2.0**24


def test_loss_scale_json_round_trip() -> None:
    """As the checkpoint's state holds it."""
    for steps in itertools.product((True, False), repeat=4):
        scale = LossScale()
        for finite in steps:
            scale = scale.after(finite)
        assert LossScale(**json.loads(json.dumps(dataclasses.asdict(scale)))) == scale


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_check_precision_cpu_has_all(precision: Precision) -> None:
    check_precision(precision, torch.device("cpu"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_check_precision_unsupported_device_raises(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise RuntimeError('"slow_conv2d_cpu" not implemented for Half')

    monkeypatch.setattr(module, "conv2d", refuse)
    with pytest.raises(
        ConfigError, match=f"train.precision={precision} does not work on cpu .*use train.precision=fp32"
    ):
        check_precision(precision, torch.device("cpu"))
    check_precision("fp32", torch.device("cpu"))

"""Ranks whose weights differ in one bit are found, and the first tensor is named."""

from pathlib import Path

import torch
from support.distributed import run_ranks
from support.model import small_config

from pipeline.errors import DriftError
from pipeline.model import build_model
from pipeline.runtime import Runtime, single
from pipeline.training.guards.drift import check_drift, digest


def drifted(runtime: Runtime) -> list[str]:
    """Messages: of equal models, of one that differs in a parameter's last bit, in a buffer, and of divided ones."""
    messages = []
    for spoil in ("nothing", "parameter", "buffer", "parameter, divided"):
        torch.manual_seed(0)
        model = build_model(small_config())
        model.register_buffer("statistics", torch.zeros(3))
        if runtime.rank == 1 and spoil.startswith("parameter"):
            parameter = list(model.parameters())[7]
            with torch.no_grad():
                flat = parameter.view(-1)
                flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))
        if runtime.rank == 1 and spoil == "buffer":
            model.get_buffer("statistics")[2] = -0.0
        try:
            check_drift(model, runtime, 12, divided="divided" in spoil)
            messages.append("")
        except DriftError as error:
            messages.append(str(error))
    return messages


def test_check_drift_one_bit_differs_raises_on_every_rank(tmp_path: Path) -> None:
    name = [name for name, _ in build_model(small_config()).named_parameters()][7]
    for equal, parameter, buffer, divided in run_ranks(drifted, 2, tmp_path):
        assert equal == divided == ""
        assert parameter.startswith("after step 12 the weights of rank 1 differ from rank 0's in 1 of ")
        assert f"the first is {name};" in parameter
        assert "the first is statistics;" in buffer


def test_check_drift_single_rank_passes() -> None:
    check_drift(build_model(small_config()), single(), 1)


def test_digest_changes_with_a_value_of_any_type() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.rand(3, 5, generator=generator).mul(9).to(dtype)
        other = tensor.clone()
        assert torch.equal(digest(tensor), digest(other))
        assert torch.equal(digest(tensor.t()), digest(tensor.t().contiguous()))
        other[1, 2] = -other[1, 2] - 1 if dtype != torch.bool else ~other[1, 2]
        assert not torch.equal(digest(tensor), digest(other))
    assert torch.equal(digest(torch.empty(0)), torch.zeros(2, dtype=torch.int64))
    assert not torch.equal(digest(torch.tensor([float("nan")])), digest(torch.tensor([1.0])))


def test_digest_scalar_has_two_sums() -> None:
    assert torch.equal(digest(torch.tensor(1)), torch.tensor([1, 1]))

"""The warning and the dump of a step with NaN, over ranks and ZeRO stages, and when the run ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.worlds import BOXES, OPTIM, batches, build

from pipeline.config import TrainConfig
from pipeline.engine import zero
from pipeline.engine.backend import Backend, PlainBackend
from pipeline.engine.step import Engine, StepResult
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.errors import NonFiniteError
from pipeline.runtime import Runtime, single
from pipeline.training.guards.nonfinite import NonFiniteGuard, summary

GOOD = StepResult(True, 1.0, {"loss": 1.0}, [])
SPOILED = 4  # the group that meets a NaN


def spoiled_step(runtime: Runtime, backend: Backend, module: Any) -> tuple[dict[str, Any], bool]:
    """The dump of a step with NaN in one image, and whether the model's next step is fine."""
    engine = Engine(module, backend, runtime, seed=0)
    saved: list[tuple[str, str]] = []
    guard = NonFiniteGuard(engine, runtime, 2, lambda text, name: saved.append((text, name)))
    groups = [group.to(torch.device("cpu")) for group in batches(runtime.rank, runtime.world, 7)]
    for group in groups:
        if group.group == SPOILED:
            group.images[0] = float("nan")
    guard.check(engine.train_step(groups, 7), groups, 7)
    (text, name), *others = saved
    assert name == "nonfinite/step_7.json"
    assert not others
    return json.loads(text), engine.train_step(batches(runtime.rank, runtime.world, 8), 8).applied


def on_ranks(runtime: Runtime) -> dict[int, tuple[dict[str, Any], bool]]:
    zero.KEEP_WHOLE = 0
    found = {}
    for stage in (1, 3):
        train = TrainConfig.model_validate({"global_batch": 2 * len(BOXES), "zero_stage": stage})
        module = build("deformable_detr", "fp32")
        found[stage] = spoiled_step(runtime, DeepSpeedBackend(module, train, OPTIM, runtime), module)
    return found


def check_dump(dump: dict[str, Any], world: int) -> None:
    assert sorted(dump["image_ids"]) == list(range(2 * len(BOXES)))  # of all ranks, each once
    assert [rank["rank"] for rank in dump["ranks"]] == list(range(world))
    assert (dump["losses"]["loss_ce"], dump["losses"]["loss"]) == ("nan", "nan")
    for rank in dump["ranks"]:
        for group in rank["groups"]:
            outputs = group["outputs"]
            assert {"output.pred_logits", "output.pred_boxes", "output.aux_outputs.0.pred_logits"} <= outputs.keys()
            bad = (outputs["output.pred_logits"]["max"], group["losses"]["loss_ce"]["max"])
            assert (bad == ("nan", "nan")) == (group["group"] == SPOILED)
    assert all(isinstance(value["max"], float) for value in dump["parameters"].values())  # the weights are sound
    assert any("class" in name for name in dump["parameters"])


def test_check_nan_step_dumps_group_outputs_and_images() -> None:
    module = build("deformable_detr", "fp32")
    dump, recovered = spoiled_step(single(), PlainBackend(module, OPTIM, torch.device("cpu")), module)
    check_dump(dump, 1)
    assert recovered


def test_check_nan_step_on_two_ranks_dumps_both(tmp_path: Path) -> None:
    for found in run_ranks(on_ranks, 2, tmp_path):
        for dump, recovered in found.values():
            check_dump(dump, 2)
            assert recovered


def test_check_limit_in_a_row_raises() -> None:
    module = build("detr", "fp32")
    with torch.no_grad():
        next(module.model.parameters()).fill_(float("inf"))
    engine = Engine(module, PlainBackend(module, OPTIM, torch.device("cpu")), single(), seed=0)
    saved: list[str] = []
    guard = NonFiniteGuard(engine, single(), 3, lambda text, name: saved.append(text))
    groups = batches(0, 1, 0)
    bad = engine.train_step(groups, 0)
    assert not bad.applied
    guard.check(bad, groups, 0)
    guard.check(bad, groups, 1)
    guard.check(GOOD, groups, 2)  # the count starts again
    guard.check(bad, groups, 3)
    guard.check(bad, groups, 4)
    with pytest.raises(NonFiniteError, match=r"step 5 .*nonfinite/step_5.json"):
        guard.check(bad, groups, 5)
    assert len(saved) == 5
    parameters = json.loads(saved[0])["parameters"]
    assert [name for name, value in parameters.items() if value["max"] == "inf"] == [next(iter(parameters))]


def test_check_step_that_lowers_the_loss_scale_is_not_counted() -> None:
    rescaled = StepResult(False, float("inf"), {"loss": 1.0}, [], rescaled=True)
    guard = NonFiniteGuard(None, single(), 1, lambda text, name: pytest.fail("dumped"))  # type: ignore[arg-type]
    for step in range(10):
        guard.check(rescaled, [], step)


def test_summary_of_nested_tensors_is_json() -> None:
    tree = {"a": torch.tensor([3.0, -4.0]), "b": [{"c": torch.tensor(float("nan"))}, "text"], "d": torch.empty(0)}
    assert json.loads(json.dumps(summary(tree), allow_nan=False)) == {
        "a": {"max": 4.0, "norm": 5.0},
        "b.0.c": {"max": "nan", "norm": "nan"},
        "d": {"max": 0.0, "norm": 0.0},
    }
    assert summary({}) == {}

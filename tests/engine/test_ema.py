"""The average of the weights: its arithmetic, equal on all ranks, exact through a checkpoint at any world size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks
from support.state import STATE_OF_TEST
from support.zero import OPTIM, STEPS, Module, Trace, build, train
from torch import nn

from pipeline import checkpoint
from pipeline.engine.backend import OptimizerState, PlainBackend
from pipeline.engine.ema import WeightAverage, decay_at, start_average
from pipeline.errors import CheckpointError
from pipeline.runtime import Runtime, single

Weights = dict[str, torch.Tensor]
DECAY = 0.5
MODES = ("0", "1", "2", "2 offloaded")  # of test_zero; stage 3 keeps whole weights nowhere, and the config refuses it


class Norm(nn.Module):
    """A trained parameter, a frozen one, and buffers of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(3)
        self.frozen = nn.Parameter(torch.full((3,), 0.3), requires_grad=False)


def changed(model: Norm, number: float) -> Norm:
    with torch.no_grad():
        model.batch_norm.weight.fill_(number)
        model.batch_norm.running_mean.fill_(number)
        model.batch_norm.num_batches_tracked.fill_(int(number))
    return model


def test_update_averages_parameters_and_copies_buffers() -> None:
    model = Norm()
    average = WeightAverage(model, DECAY)
    expected = torch.ones(3)
    for step, number in enumerate((3.0, 7.0, 5.0), start=20):  # by then the decay is warmed up
        average.update(changed(model, number), step)
        expected = DECAY * expected + (1 - DECAY) * number
    own = average.model.state_dict()
    torch.testing.assert_close(own["batch_norm.weight"], expected)
    assert torch.equal(own["batch_norm.running_mean"], torch.full((3,), 5.0))
    assert own["batch_norm.num_batches_tracked"] == 5
    assert torch.equal(own["frozen"], model.frozen)  # to the bit, however often it was averaged


def test_average_shares_no_tensor_with_the_model() -> None:
    model = Norm().train()
    average = WeightAverage(model, DECAY)
    assert average.model.state_dict().keys() == model.state_dict().keys()
    changed(model, 9.0)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    assert torch.equal(average.model.get_parameter("batch_norm.weight"), torch.ones(3))
    assert model.training
    assert model.batch_norm.weight.requires_grad


def test_start_average_from_model_or_checkpoint() -> None:
    model = changed(Norm(), 4.0)
    stored = changed(Norm(), 6.0).state_dict()
    assert start_average(model, 0.0, stored) is None
    fresh, resumed = start_average(model, DECAY, None), start_average(model, DECAY, stored)
    assert fresh is not None
    assert resumed is not None
    assert same(copied(fresh), model.state_dict())
    assert same(copied(resumed), stored)
    with pytest.raises(CheckpointError, match="`model`"):
        start_average(model, DECAY, {"other": torch.ones(1)})


def test_decay_at_rises_to_its_value() -> None:
    decays = [decay_at(step, 0.9997) for step in range(1, 100_000, 7)]
    assert decays == sorted(decays)
    assert decay_at(1, 0.9997) < 0.2  # a random start is nearly forgotten after one step
    assert decay_at(29_000, 0.9997) < decay_at(30_000, 0.9997) == 0.9997
    assert decay_at(1, 0.1) == 0.1


def follow(runtime: Runtime, folder: Path) -> dict[str, Weights]:
    """Averages of two ranks after half of the steps and at the end, there without a break and through a checkpoint."""
    found = {}
    where = (runtime.rank, runtime.world)
    for mode in MODES:
        backend, module = build(runtime, mode)
        average = WeightAverage(module.model, DECAY)
        for step in range(STEPS):
            trace = train(backend, module, *where, range(step, step + 1))
            average.update(module.model, step + 1)
            if step + 1 == STEPS // 2:
                found[f"half {mode}"] = copied(average)
                if runtime.is_main:
                    state = replace(STATE_OF_TEST, optimizer_step=step + 1)
                    moments, weights = trace.state.moments, average.model.state_dict()
                    checkpoint.save(folder / mode, state, module.model.state_dict(), moments, weights)
        found[f"full {mode}"] = copied(average)
        torch.distributed.barrier()
        found[f"resumed {mode}"] = second_half(runtime, mode, folder / mode)
    return found


def second_half(runtime: Runtime, mode: str, folder: Path) -> Weights:
    loaded = checkpoint.load(folder)
    state = OptimizerState(loaded.state.optimizer_step, loaded.moments)
    backend, module = build(runtime, mode, Trace(loaded.weights, [], state))
    average = WeightAverage(module.model, DECAY)
    assert loaded.average is not None
    checkpoint.restore_weights(average.model, loaded.average)
    for step in range(STEPS // 2, STEPS):
        train(backend, module, runtime.rank, runtime.world, range(step, step + 1))
        average.update(module.model, step + 1)
    return copied(average)


def copied(average: WeightAverage) -> Weights:
    return {name: tensor.clone() for name, tensor in average.model.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ema")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Weights]]:
    return run_ranks(follow, 2, folder, folder)


@pytest.mark.parametrize("mode", MODES)
def test_average_is_equal_on_all_ranks(ranks: list[dict[str, Weights]], mode: str) -> None:
    assert same(ranks[0][f"full {mode}"], ranks[1][f"full {mode}"])
    assert not same(ranks[0][f"full {mode}"], ranks[0][f"half {mode}"])


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_equal(ranks: list[dict[str, Weights]], mode: str) -> None:
    assert all(same(rank[f"resumed {mode}"], rank[f"full {mode}"]) for rank in ranks)


@pytest.mark.parametrize("mode", MODES)
def test_another_world_size_starts_from_the_same_average(
    ranks: list[dict[str, Weights]], folder: Path, mode: str
) -> None:
    loaded = checkpoint.load(folder / mode)
    assert loaded.average is not None
    assert same(loaded.average, ranks[1][f"half {mode}"])
    state = OptimizerState(loaded.state.optimizer_step, loaded.moments)
    module = Module()
    module.model.load_state_dict(loaded.weights)
    average = WeightAverage(module.model, DECAY)
    checkpoint.restore_weights(average.model, loaded.average)
    backend = PlainBackend(module, OPTIM, single().device)
    backend.load_optimizer_state(state)
    for step in range(STEPS // 2, STEPS):
        train(backend, module, 0, 1, range(step, step + 1))
        average.update(module.model, step + 1)
    for name, value in copied(average).items():
        torch.testing.assert_close(value, ranks[0][f"full {mode}"][name], rtol=1e-5, atol=1e-7)

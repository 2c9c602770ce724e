"""Runs that resume at another world size or ZeRO stage have the same samples and losses as before.

Real shards, loader, dropout, size grouping and checkpoints, in gloo processes without Ray;
`integration/test_chaos.py` does it once with Ray. Four pad groups of two images, so three ranks repeat groups with
weight 0.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks
from support.paths import ROOT

from pipeline import checkpoint
from pipeline.checkpoint import TrainState
from pipeline.config import Config, dump, load_config
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.engine.backend import OptimizerState
from pipeline.engine.module import LossModule
from pipeline.engine.optim import lr_factor, set_learning_rates
from pipeline.engine.step import Engine
from pipeline.engine.zero import DeepSpeedBackend
from pipeline.model import build_criterion, build_model
from pipeline.runtime import Runtime

LEFT, STEPS = 3, 23  # steps before a run leaves, and in all: 20 after that, over three epochs' ends


@dataclass(frozen=True)
class Leg:
    """Part of a run, to step `until`: from checkpoint `start` or from nothing; `save` maps steps to checkpoints."""

    until: int
    start: str = ""
    save: tuple[tuple[int, str], ...] = ()
    stage: int = 1


@dataclass
class Step:
    loss: float
    groups: dict[int, list[int]]  # image ids of this rank's pad groups, those of weight 0 not among them


Trace = dict[int, Step]  # by number of the step, from 1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("worlds")
    annotations, images = write_synthetic(folder / "raw", images=48, seed=0, size=96)
    build_shards(annotations, images, folder / "shards")
    overrides = {
        "data.train": str(folder / "shards"),
        "data.augment.scales": [80, 96, 112],
        "data.augment.max_size": 160,
        "model.hidden_dim": 32,
        "model.heads": 4,
        "model.ffn_dim": 32,
        "model.queries": 10,
        "model.dropout": 0.1,
        "model.backbone.width": 8,
        "model.op": "torch",
        "train.micro_batch": 2,
    }
    return load_config(ROOT / "jobs" / "configs" / "demo.yaml", overrides)


def run_legs(runtime: Runtime, config: Config, folder: Path, legs: list[Leg]) -> list[Trace]:
    return [run_leg(runtime, config, folder, leg) for leg in legs]


def run_leg(runtime: Runtime, config: Config, folder: Path, leg: Leg) -> Trace:
    """One rank's part, put together as `worker.py` does."""
    train = config.train.model_copy(update={"zero_stage": leg.stage})
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    module = LossModule(model, build_criterion(config.loss))
    loader = TrainLoader(config.data, train, config.seed, runtime.rank, runtime.world)
    state = TrainState(dump(config), loader.index.categories, loader.index.digest, 0, 0, 0, 0)
    moments: dict[str, torch.Tensor] = {}
    if leg.start:
        loaded = checkpoint.load(folder / leg.start)
        checkpoint.restore_weights(model, loaded.weights)
        state, moments = loaded.state, loaded.moments
    backend = DeepSpeedBackend(module, train, config.optim, runtime)
    backend.load_optimizer_state(OptimizerState(state.optimizer_step, moments))
    engine = Engine(module, backend, runtime, config.seed)
    trace: Trace = {}
    while state.global_step < leg.until:
        for batches in loader.epoch(state.epoch, state.step):
            now = state.global_step
            set_learning_rates(backend.optimizer, lr_factor(config.optim, state.epoch, now, STEPS))
            result = engine.train_step(batches, now)
            trace[now + 1] = Step(result.losses["loss"], {b.group: b.image_ids.tolist() for b in batches if b.weight})
            epoch, step = divmod(now + 1, loader.steps_per_epoch)
            state = TrainState(dump(config), state.categories, state.data_digest, epoch, step, now + 1, now + 1)
            for at, name in leg.save:
                if at == now + 1:
                    optimizer = backend.optimizer_state()
                    if runtime.is_main:
                        checkpoint.save(folder / name, state, model.state_dict(), optimizer.moments)
            if now + 1 == leg.until:
                break
    if runtime.world > 1:
        dist.barrier()  # what rank 0 has saved may be the start of the next leg
    return trace


def legs_of(world: int, config: Config, folder: Path, *legs: Leg) -> list[Trace]:
    """The legs at a world size, each with the groups of all ranks."""
    ranks = run_ranks(run_legs, world, folder, config, folder, list(legs))
    merged = []
    for traces in zip(*ranks, strict=True):
        for others in traces[1:]:
            for number, step in others.items():
                assert step.loss == traces[0][number].loss
                assert not step.groups.keys() & traces[0][number].groups.keys()
                traces[0][number].groups |= step.groups
        merged.append(traces[0])
    return merged


def assert_goes_on(found: Trace, whole: Trace, first: int, until: int = STEPS) -> None:
    assert [*found] == [*range(first, until + 1)]
    assert found[first].loss == pytest.approx(whole[first].loss, rel=1e-6)
    for number, step in found.items():
        assert step.groups == whole[number].groups
        assert sorted(step.groups) == [0, 1, 2, 3]
        assert step.loss == pytest.approx(whole[number].loss, rel=1e-4), number


def test_resume_two_ranks_to_one_and_zero_1_to_2_to_0(config: Config, tmp_path: Path) -> None:
    whole, same, two, zero = legs_of(
        2, config, tmp_path,
        Leg(STEPS, save=((LEFT, "two"),)),
        Leg(LEFT + 2, "two"),
        Leg(LEFT + 11, "two", stage=2, save=((LEFT + 10, "stage_2"),)),
        Leg(STEPS, "stage_2", stage=0),
    )  # fmt: skip
    for number, step in same.items():  # the same world and stage: the same bits
        assert step == whole[number]
    assert_goes_on(two, whole, LEFT + 1, LEFT + 11)
    # ten steps of stage 2 have rounded otherwise than those of `whole`
    assert_goes_on(zero, whole | {LEFT + 11: two[LEFT + 11]}, LEFT + 11)
    (one,) = legs_of(1, config, tmp_path, Leg(STEPS, "two"))
    assert_goes_on(one, whole, LEFT + 1)


@pytest.mark.slow
def test_resume_one_rank_to_two_to_three_to_four(config: Config, tmp_path: Path) -> None:
    (one,) = legs_of(1, config, tmp_path, Leg(STEPS, save=((LEFT, "one"),)))
    two, grown = legs_of(2, config, tmp_path, Leg(STEPS, save=((LEFT, "two"),)), Leg(STEPS, "one"))
    assert_goes_on(grown, one, LEFT + 1)
    for world in (3, 4):
        (found,) = legs_of(world, config, tmp_path, Leg(STEPS, "two"))
        assert_goes_on(found, two, LEFT + 1)

"""DeepSpeed's gradients, updates and optimizer state against plain PyTorch, over ranks, ZeRO stages and precisions."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import safetensors.torch
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from support.distributed import run_ranks
from support.state import STATE_OF_TEST
from support.zero import MODES, OPTIM, STEPS, Module, Net, Trace, build, train

from pipeline import checkpoint
from pipeline.config import TrainConfig, from_dict
from pipeline.engine import zero
from pipeline.engine.backend import MOMENTS, OptimizerState, PlainBackend
from pipeline.engine.precision import DTYPES, LossScale
from pipeline.engine.zero import DeepSpeedBackend, deepspeed_config, overlaps
from pipeline.errors import CheckpointError, ConfigError
from pipeline.runtime import Runtime, single


@dataclass
class Copies:
    """What `optimizer_state` does on one rank."""

    requests: int = 0  # for a tensor on the CPU: on a GPU each is a transfer
    bytes_requested: int = 0
    bytes_kept: int = 0
    file: bytes = b""  # the checkpoint's, if it has one
    expected: bytes = b""  # the file of moments that this rank collected with DeepSpeed alone


def count_copies(backend: DeepSpeedBackend, runtime: Runtime) -> Copies:
    found = Copies()

    def counting(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def to(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            if method.__name__ == "cpu" or "cpu" in map(str, (*args, options.get("device"))):
                found.requests += 1
                found.bytes_requested += tensor.numel() * tensor.element_size()
            return method(tensor, *args, **options)

        return to

    with pytest.MonkeyPatch.context() as patch:
        for name in ("to", "cpu"):
            patch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
        state = backend.optimizer_state()
    found.bytes_kept = sum(moment.numel() * moment.element_size() for moment in state.moments.values())
    expected = {}
    for name, parameter in backend._trainable():
        for key in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, key)  # nothing without ZeRO
            whole = backend.optimizer.state[parameter][key] if whole is None else whole
            expected[f"{key}/{name}"] = whole.clone()
    found.expected = safetensors.torch.save(expected)
    if runtime.is_main:
        with TemporaryDirectory() as folder:
            checkpoint.save(Path(folder), STATE_OF_TEST, {}, state.moments)
            found.file = (Path(folder) / checkpoint.OPTIMIZER).read_bytes()
    return found


def scenarios(runtime: Runtime) -> tuple[dict[str, Trace], dict[str, Copies]]:
    """Everything two ranks are asked to show, in one start of DeepSpeed."""
    zero.KEEP_WHOLE = 0  # else ZeRO 3 divides nothing of a net this small
    traces, copies = {}, {}
    where = (runtime.rank, runtime.world)
    for mode, after in zip(MODES, [*list(MODES)[1:], "0"], strict=True):
        backend, module = build(runtime, mode)
        half = train(backend, module, *where, range(STEPS // 2))
        traces[f"half {mode}"] = half
        traces[f"full {mode}"] = train(backend, module, *where, range(STEPS // 2, STEPS))
        traces[f"resumed {mode}"] = train(*build(runtime, mode, half), *where, range(STEPS // 2, STEPS))
        traces[f"moved {mode}"] = train(*build(runtime, after, half), *where, range(STEPS // 2, STEPS))
        traces[f"spoiled {mode}"] = train(*build(runtime, mode), *where, range(STEPS), spoil=1)
        copies[mode] = count_copies(backend, runtime)
    with pytest.raises(CheckpointError, match=r"exp_avg of backbone\.weight"):
        backend.load_optimizer_state(OptimizerState(1, {}))
    return traces, copies


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Trace], dict[str, Copies]]]:
    folder: Path = tmp_path_factory.mktemp("zero")
    return run_ranks(scenarios, 2, folder)


@pytest.fixture(scope="module")
def ranks(both: list[tuple[dict[str, Trace], dict[str, Copies]]]) -> list[dict[str, Trace]]:
    return [traces for traces, _ in both]


@pytest.fixture(scope="module")
def plain() -> dict[str, Trace]:
    traces = {}
    for precision in ("fp32", "fp16"):
        for name, spoil in (("full", -1), ("spoiled", 1)):
            module = Module()
            module.dtype = DTYPES[precision]
            backend = PlainBackend(module, OPTIM, single().device, precision)  # type: ignore[arg-type]
            traces[f"{name} {precision}"] = train(backend, module, 0, 1, range(STEPS), spoil)
    return traces


def precision_of(mode: str) -> str:
    return "fp16" if "fp16" in mode else "fp32"


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_plain_pytorch(ranks: list[dict[str, Trace]], plain: dict[str, Trace], mode: str) -> None:
    full, wanted = ranks[0][f"full {mode}"], plain[f"full {precision_of(mode)}"]
    assert_same(full.weights, wanted.weights, 1e-5)
    assert_same(full.state.moments, wanted.state.moments, 1e-4)
    assert full.state.step == STEPS
    assert full.state.loss_scale == wanted.state.loss_scale
    assert full.norms == pytest.approx(wanted.norms[STEPS // 2 :], rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_state_only_rank_0_copies_to_the_cpu(
    both: list[tuple[dict[str, Trace], dict[str, Copies]]], mode: str
) -> None:
    first, second = (copies[mode] for _, copies in both)
    trainable = [p for p in Net().parameters() if p.requires_grad]
    size = sum(len(MOMENTS) * p.numel() * p.element_size() for p in trainable)
    if mode.startswith("3"):  # DeepSpeed moves each rank's shard to its device, which is the CPU here
        first.requests -= second.requests
        first.bytes_requested -= second.bytes_requested
        second.requests = second.bytes_requested = 0
    assert (first.requests, first.bytes_requested, first.bytes_kept) == (len(MOMENTS) * len(trainable), size, size)
    assert (second.requests, second.bytes_requested, second.bytes_kept) == (0, 0, 0)
    assert first.file == first.expected == second.expected


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_equal(ranks: list[dict[str, Trace]], mode: str) -> None:
    for rank in ranks:
        full, resumed = rank[f"full {mode}"], rank[f"resumed {mode}"]
        assert all(torch.equal(full.weights[n], resumed.weights[n]) for n in full.weights)
        assert all(torch.equal(full.state.moments[n], resumed.state.moments[n]) for n in full.state.moments)
        assert full.state.loss_scale == resumed.state.loss_scale


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("3 overlapping", "3 fp16")])
def test_state_moves_to_another_stage(ranks: list[dict[str, Trace]], mode: str) -> None:
    """To the next mode of MODES; the two left out change the precision at the same time."""
    assert_same(ranks[1][f"moved {mode}"].weights, ranks[1][f"full {mode}"].weights, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_state_moves_to_one_process(ranks: list[dict[str, Trace]], mode: str) -> None:
    half, precision = ranks[0][f"half {mode}"], precision_of(mode)
    module = Module()
    module.dtype = DTYPES[precision]
    module.model.load_state_dict(half.weights)
    backend = PlainBackend(module, OPTIM, single().device, precision)  # type: ignore[arg-type]
    backend.load_optimizer_state(half.state)
    moved = train(backend, module, 0, 1, range(STEPS // 2, STEPS))
    assert_same(moved.weights, ranks[0][f"full {mode}"].weights, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_non_finite_gradient_changes_nothing(ranks: list[dict[str, Trace]], plain: dict[str, Trace], mode: str) -> None:
    spoiled, precision = ranks[0][f"spoiled {mode}"], precision_of(mode)
    assert spoiled.state.step == STEPS - 1
    assert_same(spoiled.weights, plain[f"spoiled {precision}"].weights, 1e-5)
    if precision == "fp16":
        assert spoiled.state.loss_scale == LossScale(LossScale().scale / 2, STEPS - 2)


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer.*zero_stage"),
        ({"zero_stage": 3, "ema_decay": 0.9}, "ema_decay.*zero_stage|zero_stage.*ema_decay"),
        ({"zero_stage": 3, "compile": True}, "compile.*zero_stage|zero_stage.*compile"),
        ({"zero_stage": 3, "fold_norms": True}, "fold_norms.*zero_stage"),
        ({"zero_stage": 3, "cast_weights_once": True}, "cast_weights_once.*zero_stage"),
        *(({"zero_stage": stage, "channels_last": True}, "channels_last.*zero_stage") for stage in (1, 2, 3)),
        *(({"zero_stage": stage, "delay_results": True}, "delay_results.*zero_stage") for stage in (1, 2, 3)),
    ],
)
def test_a_stage_with_a_setting_it_forbids_is_refused(settings: dict[str, Any], keys: str) -> None:
    with pytest.raises(ConfigError, match=keys):
        from_dict({"train": settings})


@pytest.mark.parametrize("world", range(1, 9))
def test_batch_arithmetic_adds_up(world: int) -> None:
    train_config = TrainConfig(global_batch=16, micro_batch=2)
    settings = deepspeed_config(train_config, OPTIM, world, trainable=100, overlap=False)
    assert settings["gradient_accumulation_steps"] * world >= 8
    product = settings["train_micro_batch_size_per_gpu"] * settings["gradient_accumulation_steps"] * world
    assert settings["train_batch_size"] == product


@pytest.mark.parametrize(
    ("device", "world", "trainable", "bucket", "overlap"),
    [
        ("cpu", 2, 40_000_000, 40_000_000, False),
        ("cuda", 1, 40_000_000, 40_000_000, False),  # nothing is sent
        ("cuda", 2, 40_000_000, 25 * 2**20 // 4, True),
        ("cuda", 2, 1_000, 1_000, True),
    ],
)
def test_deepspeed_config_overlaps_in_buckets_of_25_mb_where_gpus_communicate(
    device: str, world: int, trainable: int, bucket: int, overlap: bool
) -> None:
    for stage in range(4):
        train_config = TrainConfig(global_batch=16, micro_batch=2, zero_stage=stage)
        found = deepspeed_config(train_config, OPTIM, world, trainable, overlaps(world, torch.device(device)))
        zero_settings = found["zero_optimization"]
        assert (zero_settings["reduce_bucket_size"], zero_settings["overlap_comm"]) == (bucket, overlap)

"""benchmarks/scaling.py: its bytes are those that DeepSpeed sends, its times follow the laws it states."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.distributed import run_ranks
from support.paths import ROOT
from torch import nn

from benchmarks import scaling
from benchmarks.scaling import Setting, bandwidth, build_parser, checkpoint_bytes, evenness, run, traffic
from jobs.cli import main
from pipeline.config import OptimConfig, TrainConfig, load_config
from pipeline.engine.batching import BatchArithmetic
from pipeline.model import build_model
from pipeline.runtime import Runtime

WIDTH, PASSES = 128, 2
worlds = st.integers(1, 1024)


class Module(nn.Module):
    """Stands for engine.LossModule."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: torch.Tensor, norm: float) -> torch.Tensor:
        return self.model(x).square().mean() * norm


def bytes_sent(runtime: Runtime) -> tuple[list[float], int]:
    """By a rank in its second step at ZeRO 0, 1 and 2, as a ring sends each collective; and the gradient's bytes."""
    from pipeline.engine.zero import DeepSpeedBackend

    sent = 0.0
    share = (runtime.world - 1) / runtime.world

    def counting(name: str, argument: str, factor: float) -> None:
        original = getattr(torch.distributed, name)

        def collective(*args: Any, **options: Any) -> Any:
            nonlocal sent
            tensor = options.get(argument, args[0] if args else None)
            sent += factor * share * tensor.numel() * tensor.element_size()
            return original(*args, **options)

        setattr(torch.distributed, name, collective)

    counting("all_reduce", "tensor", 2)
    counting("all_gather_into_tensor", "output_tensor", 1)
    by_stage, gradient = [], 0
    for stage in (0, 1, 2):
        module = Module()
        train = TrainConfig(micro_batch=1, global_batch=PASSES * runtime.world, zero_stage=stage)
        backend = DeepSpeedBackend(module, train, OptimConfig(), runtime)
        for step in range(2):
            sent = 0.0
            for _ in range(PASSES):
                backend.backward(backend.forward(torch.ones(1, WIDTH), step + 1.0))
            backend.step()
        by_stage.append(sent)
        gradient = sum(4 * p.numel() for p in module.parameters())
    return by_stage, gradient


@pytest.mark.slow  # two processes that import DeepSpeed
def test_deepspeed_sends_what_the_model_says(tmp_path: Path) -> None:
    for by_stage, gradient in run_ranks(bytes_sent, 2, tmp_path):
        expected = [traffic(stage, 2, PASSES, gradient).total for stage in (0, 1, 2)]
        assert by_stage == pytest.approx(expected, rel=0.01)


@given(worlds, st.integers(1, 8), st.floats(1, 1e9))
def test_bytes(world: int, passes: int, gradient: float) -> None:
    none, moments, gradients = (traffic(stage, world, passes, gradient) for stage in (0, 1, 2))
    assert none.total <= moments.total <= gradients.total <= 3 * passes * gradient
    assert none.total == pytest.approx(2 * (world - 1) / world * gradient)
    assert gradients.reduced == pytest.approx(passes * moments.reduced)
    assert moments.gathered == pytest.approx(none.reduced / 2)


@given(worlds, st.integers(1, 64), st.sampled_from([0, 1, 2]), st.floats(0.001, 2), st.floats(0.3, 1))
def test_efficiency(world: int, groups: int, stage: int, seconds: float, even: float) -> None:
    setting = Setting(seconds, stage=stage)
    arithmetic = BatchArithmetic(2 * groups, 2, world)
    by_network = [setting.efficiency(arithmetic, even, gbit, overlap=False) for gbit in (10, 100, 400, 1e6)]
    assert by_network == sorted(by_network)
    for gbit, plain in zip((10, 100, 400, 1e6), by_network, strict=True):
        assert 0 < plain <= even * (1 + 1e-9)
        assert 0 < setting.efficiency(arithmetic, even, gbit, overlap=True) <= even * (1 + 1e-9)
        after, beside = (setting.seconds(arithmetic, even, gbit, overlap) for overlap in (False, True))
        more = (setting.buckets - 1) * setting.reducing_passes(arithmetic)  # messages, each with its latency
        assert beside <= after * (1 + 1e-9) + more * 2 * scaling.HOP * (world - 1)
        assert stage or beside == after
    if world == 1:
        assert by_network[0] == pytest.approx(even)
    if (
        world > scaling.NODE
    ):  # at the network that hides it, nothing but latency, the last bucket and the gather is left of the reduction
        enough = setting.bandwidth_to_hide(arithmetic)
        sent = traffic(stage, world, arithmetic.passes, setting.gradient)
        left = setting.seconds(arithmetic, even, enough, overlap=True) - arithmetic.passes * seconds / even
        messages = setting.buckets * setting.reducing_passes(arithmetic)
        latency = scaling.HOP * 2 * world * (messages + 1)
        if stage and enough < 8 * scaling.NVLINK:
            last = sent.reduced / setting.buckets
            assert left <= (last + sent.gathered) / bandwidth(world, enough) + latency


def test_an_idle_rank_is_not_efficient() -> None:
    """64 GPUs and the recipe's 32 images: 16 pad groups keep a quarter of them busy."""
    assert Setting(1.0).efficiency(BatchArithmetic(32, 2, 64), 1.0, 1e6, overlap=True) == pytest.approx(0.25, rel=0.01)


def test_the_bucket_is_the_one_that_deepspeed_gets() -> None:
    from pipeline.engine import zero

    assert scaling.BUCKET_BYTES == 4 * zero.BUCKET_ELEMENTS
    assert Setting(1.0).buckets == 7


def test_the_sizes_are_the_models() -> None:
    config = load_config(ROOT / "jobs" / "configs" / "r50_deformable.yaml", ["model.backbone.weights=none"])
    model = build_model(config.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == scaling.PARAMETERS
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert checkpoint_bytes(average=False) == weights + 8 * trained
    assert checkpoint_bytes(average=True) == 2 * weights + 8 * trained


def test_slower_ranks_come_from_the_plan() -> None:
    narrow, wide = evenness(1024, 2, 512, 256), evenness(1024, 2, 512, 8192)
    assert 0.3 < narrow < wide < 1
    assert evenness(32, 2, 12, 256) > 0.8  # 16 groups on 12 ranks: that 8 of 24 passes are idle is not counted twice


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = tmp_path / "gpu.json"
    measured.write_text(json.dumps({"steps": [{"ms": 300.0}, {"ms": 100.0}]}))
    out = tmp_path / "out.json"
    argv = ["--measured", str(measured), "--gpus", "8", "64", "--network", "100", "--zero", "0", "--json", str(out)]
    assert main(build_parser(), run, argv) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["gpus"], row["global_batch"], row["passes"]) for row in rows] == [(8, 32, 2), (64, 128, 1)]
    assert rows[0]["zero_0_mb"] == round(2 * 7 / 8 * 4 * scaling.PARAMETERS / 1e6)
    said = capsys.readouterr().out
    assert "'pass_seconds': 0.1" in said
    assert "checkpoint: 479 MB" in said


def test_the_page_has_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/many_gpus.md").read_text()
    (command,) = re.findall(r"^python -m benchmarks.scaling (.*)$", page, re.MULTILINE)
    assert main(build_parser(), run, command.split()) == 0
    printed = cells(capsys.readouterr().out)
    assert cells(page) == [
        [gpus, f"{int(batch):,}", " / ".join(rest[1:4]), *rest[:1], *rest[4:]] for gpus, batch, _, *rest in printed
    ]


def cells(text: str) -> list[list[str]]:
    """Of the rows of a table that begin with a number."""
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (\d.*) \|$", text, re.MULTILINE)]


@pytest.mark.parametrize("argv", [[], ["--pass-seconds", "0"], ["--pass-seconds", "1", "--gpus", "0"]])
def test_bad_input(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(build_parser(), run, argv) == 2
    assert "--pass-seconds" in capsys.readouterr().err
    assert main(build_parser(), run, ["--measured", str(tmp_path / "none.json")]) == 2
    assert "give --pass-seconds" in capsys.readouterr().err

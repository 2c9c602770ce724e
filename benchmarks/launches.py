"""`python -m benchmarks.launches`: GPU launches and waits of one training step, counted without a GPU.

The engine's own step of a preset runs on the CPU on two small images, because the number of operations does not depend
on the size. Every operation that computes or copies counts as one launch; views and allocations count nothing. Where
the CPU's operations differ from a GPU's, it counts as on a GPU: fused AdamW, one operation per dropout and per dense
attention, and one per list of tensors if all have the same types (else one per tensor). A few operations launch several
kernels on a GPU, such as the backward of a convolution, so the profiler of `benchmarks.gpu` shows more. A wait is a
call that brings a number from the device to the host, or a copy to the device for which the host waits.
"""

import argparse
import collections
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.model import random_batch
from jobs.cli import CommandParser, Parser, main
from pipeline.config import Config, load_config
from pipeline.data.batch import Batch
from pipeline.engine.backend import PlainBackend
from pipeline.engine.cpu_tuning import tune_model, use_channels_last
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
SIZE = (96, 128)  # of the images, in pixels
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_record_function_enter_new",
        "_record_function_exit", "_local_scalar_dense", "set_", "resize_", "_unsafe_view"}  # fmt: skip
READS = {"cpu", "tolist", "item", "__float__", "__int__", "__bool__", "__index__", "nonzero", "masked_select"}
UPLOADS = {"tensor", "as_tensor"}  # with a device: the host waits until its memory has been read


class Launches(TorchDispatchMode):
    """Counts launches by operation while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.counting = True
        self._drops = False  # the last operation drew a dropout's mask

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        name = function.overloadpacket.__name__
        mask = name == "bernoulli_" or (name == "div_" and self._drops)  # part of a GPU's only dropout operation
        if self.counting and not (function.is_view or name in FREE or mask):
            self.counts[name] += _of_lists(args) if name.startswith("_foreach_") else 1
        self._drops = name == "bernoulli_"
        return function(*args, **(kwargs or {}))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count what happens inside as one operation."""
        self.counts["attention"] += 1
        self.counting = False
        yield
        self.counting = True


class OneAttention(torch.autograd.Function):
    """Dense attention that counts as one operation in each direction, as a GPU's fused kernel."""

    @staticmethod
    def forward(ctx: Any, launches: Launches, dropout: float, *inputs: Tensor) -> Tensor:
        """Attention of queries, keys and values."""
        ctx.launches = launches
        with launches.paused(), torch.enable_grad():
            ctx.inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            query, key, value = ctx.inputs
            ctx.output = scaled_dot_product_attention(query, key, value, dropout_p=dropout)
            return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values."""
        with ctx.launches.paused():
            return None, None, *torch.autograd.grad(ctx.output, ctx.inputs, grads)


def _of_lists(args: Iterable[Any]) -> int:
    """Launches of an operation on lists of tensors: one per tensor if those of a list differ in type or layout."""
    lists = [values for values in args if isinstance(values, list | tuple) and isinstance(values[0], Tensor)]
    alike = all(len({tensor.dtype for tensor in values}) == 1 for values in lists)
    same = all(len({(t.shape, t.stride()) for t in row}) == 1 for row in zip(*lists, strict=True))
    return 1 if alike and same else len(lists[0])


class Waits(TorchFunctionMode):
    """Counts the calls that make the host wait for the device, by name, while it is active.

    Args:
        on_host: tensors that are not on the device.
    """

    def __init__(self, on_host: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self._on_host = {tensor.untyped_storage().data_ptr() for tensor in on_host}
        self._kept: list[Tensor] = []  # or the address of one could be that of another

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and count it."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        reads = name in READS and not self._is_on_host(args[0])
        if reads or (name in UPLOADS and kwargs.get("device") is not None):
            self.counts[name] += 1
        result = function(*args, **kwargs)
        if (name == "cpu" or name in UPLOADS) and kwargs.get("device") is None:
            self._on_host.add(result.untyped_storage().data_ptr())
            self._kept.append(result)
        return result

    def _is_on_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._on_host


def build_engine(config: Config, zero: bool = False, groups: int = 1) -> Engine:
    """The engine of a run with random weights whose steps have `groups` pad groups.

    Args:
        config: of the run.
        zero: whether DeepSpeed makes the step (in this process alone), as in a run, or plain PyTorch.
        groups: pad groups of a step.
    """
    torch.manual_seed(0)
    runtime = single()
    model = build_model(config.model, load_backbone=False)
    tune_model(model, config.train.model_copy(update={"cpu_tuning": False, "channels_last": False}), runtime.device)
    train = config.train
    criterion = build_criterion(config.loss)
    module = LossModule(model, criterion, train.precision, train.cast_weights_once, train.fold_norms)
    if zero:
        from pipeline.engine.zero import DeepSpeedBackend

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
        train = train.model_copy(update={"global_batch": groups * train.pad_group})  # a step ends with its groups
        backend: Any = DeepSpeedBackend(module, train, config.optim, runtime)
    else:
        backend = PlainBackend(module, config.optim, runtime.device, config.train.precision)
    if config.train.channels_last and not (zero and backend.divides):  # as in a run: DeepSpeed sends plain weights
        use_channels_last(model)
    for group in backend.optimizer.param_groups:
        group["fused"] = True
    return Engine(module, backend, runtime, config.seed, train.delay_results)


@contextmanager
def as_on_gpu(launches: Launches) -> Iterator[None]:
    """Clip all gradients in one operation, and let attention be one."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: None, dropout: float, *_: Any) -> Tensor:
        output: Tensor = OneAttention.apply(launches, dropout, q, k, v)
        return output

    clip = functools.partial(nn.utils.clip_grad_norm_, foreach=True)
    with (
        mock.patch("torch.nn.utils.clip_grad_norm_", clip),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
    ):
        yield


def count(engine: Engine, batches: Sequence[Batch]) -> tuple[Launches, Waits]:
    """The launches and waits of a step, the second one: the first also makes the optimizer's state."""
    on_host = [getattr(b, name) for b in batches for name in ("target_offsets", "image_ids", "sizes")]
    launches, waits = Launches(), Waits(on_host)
    with as_on_gpu(launches):
        engine.train_step(batches, 0)
        with launches, waits:
            engine.train_step(batches, 1)
    return launches, waits


def build_parser() -> Parser:
    """The command line."""
    parser = CommandParser(
        "benchmarks.launches", __doc__.splitlines()[0], "python -m benchmarks.launches --preset r50_deformable_gpu"
    )
    parser.add_argument("--preset", default="r50_deformable", help="in jobs/configs; default %(default)s")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--groups", type=int, default=1, help="pad groups of the step; default %(default)s")
    parser.add_argument("--deepspeed", action="store_true", help="step through DeepSpeed with train.zero_stage")
    parser.add_argument("--top", type=int, default=0, help="print the most frequent operations")
    return parser


def run(args: argparse.Namespace) -> int:
    """Count and print."""
    overrides = ["model.backbone.weights=none", "train.compile=false", *args.set]
    config = load_config(CONFIGS / f"{args.preset}.yaml", overrides)
    group = random_batch(config.train.pad_group, *SIZE)
    launches, waits = count(build_engine(config, args.deepspeed, args.groups), [group] * args.groups)
    row = {"preset": args.preset, "set": args.set, "launches": launches.counts.total(), "waits": dict(waits.counts)}
    print(json.dumps(row))
    for name, number in launches.counts.most_common(args.top):
        print(f"{number:6d} {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(build_parser(), run))

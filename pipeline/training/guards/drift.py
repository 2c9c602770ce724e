"""The drift guard: a check that all ranks still have bit-equal weights, which a fault of memory or network breaks.

It runs every `train.drift_steps` steps and exchanges sixteen bytes per tensor. Under ZeRO 3 only buffers can be
compared, because every weight exists once. A difference is a DriftError that names the first tensor.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import DriftError
from pipeline.runtime import Runtime

_WORD_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


def check_drift(model: nn.Module, runtime: Runtime, step: int, divided: bool = False) -> None:
    """Compare parameters and buffers of all ranks (a collective).

    Args:
        model: the trained one.
        runtime: this rank.
        step: for the message.
        divided: whether parameters are partitioned over the ranks (ZeRO 3); then only buffers are compared.

    Raises:
        DriftError: on every rank, if any two of them differ.
    """
    tensors = dict(model.named_buffers()) if divided else dict(model.state_dict(keep_vars=True))
    if runtime.world == 1 or not tensors:
        return
    own = torch.stack([digest(tensor) for tensor in tensors.values()])
    ranks = [torch.empty_like(own) for _ in range(runtime.world)]
    dist.all_gather(ranks, own)
    same = (torch.stack(ranks) == ranks[0]).all(-1)  # [world, tensors]
    if bool(same.all()):
        return
    names = [name for name, equal in zip(tensors, same.all(0).tolist(), strict=True) if not equal]
    others = [rank for rank, equal in enumerate(same.all(1).tolist()) if not equal]
    raise DriftError(
        f"after step {step} the weights of rank {', '.join(map(str, others))} differ from rank 0's in {len(names)} of "
        f"{len(tensors)} tensors, the first is {names[0]}; a GPU, its memory or the network is faulty. The run "
        "continues from its last checkpoint; if it happens again, remove the node (train.drift_steps=0 ends this check)"
    )


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """Two int64 over the bits of a tensor: the sum of its words, and the sum of their squares.

    Integer sums do not depend on the order of addition, so they are equal on all kinds of device.
    """
    words = tensor.detach().contiguous().view(_WORD_TYPES[tensor.element_size()]).long()
    return torch.stack([words.sum(), (words * words).sum()])

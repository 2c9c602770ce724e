"""`train.compile`: torch.compile for the backbone and every transformer layer, each on its own. Used by `worker.py`.

Layers of a kind share one compiled program, so that a model of 12 layers compiles two: about a sixth of the time that
the whole model takes. Names in the state_dict stay. Matcher, losses and what selects queries stay eager, and so does
evaluation: it would compile again for every mode, and `jobs.evaluate` shall give the very numbers of the training run.

Sizes are symbols from the start (`dynamic`), because pad groups have hundreds of them. What still compiles again: a
group of one image, another memory layout, and on the CPU sizes for which it has other kernels. Of one layer torch makes
`torch._dynamo.config.recompile_limit` programs at most and runs further cases eagerly. It needs a C++ compiler, on a
GPU also Triton; without them the first step fails with torch's own error.
"""

from torch import nn

from pipeline.model.detector import Detector
from pipeline.model.layers import FeedForward

# Dropout from torch's generator, as in eager mode: a run may go on with the setting switched on or off.
OPTIONS = {"fallback_random": True}


def compile_regions(model: Detector, backend: str = "inductor") -> None:
    """Compile in place; nothing happens before the first forward in training.

    Args:
        model: any detector; what it has besides a backbone and transformer layers stays eager.
        backend: of torch.compile; `aot_eager` traces and differentiates but generates no code.
    """
    options = OPTIONS if backend == "inductor" else None
    for region in regions(model):
        region.compile(dynamic=True, backend=backend, options=options)


def regions(model: Detector) -> list[nn.Module]:
    """The modules that are compiled one by one. With `model.norm_valid` the backbone is none of them.

    Of its masked norms torch 2.14 generates no code for sizes that are symbols: it fails, or does not end.
    """
    backbone = [] if model.config.norm_valid else [model.get_submodule("backbone")]
    return [*backbone, *(m for m in model.modules() if isinstance(m, FeedForward))]

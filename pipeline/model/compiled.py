"""`train.compile`: torch.compile for the backbone and every transformer layer separately.

Layers of one kind share a compiled program, so a model of 12 layers compiles two programs. That takes about a sixth of
the time for the whole model. Names in the state_dict do not change. Matcher, losses and the selection of queries stay
eager. Evaluation stays eager too: it would compile again for every mode, and `jobs.evaluate` must reproduce the numbers
of the training run.

Sizes are symbolic (`dynamic`), because pad groups have hundreds of sizes. These cases still recompile: a group of one
image, another memory layout, and on the CPU sizes with other kernels. Torch compiles at most
`torch._dynamo.config.recompile_limit` programs of a layer and runs further cases eagerly. A C++ compiler is needed, on
a GPU also Triton; without them the first step fails with torch's own error.
"""

from torch import nn

from pipeline.model.detector import Detector
from pipeline.model.layers import FeedForward

# Dropout uses torch's generator as in eager mode, so that a run can be resumed with the setting changed.
OPTIONS = {"fallback_random": True}


def compile_regions(model: Detector, backend: str = "inductor") -> None:
    """Compile the regions in place; compilation starts with the first forward in training.

    Args:
        model: any detector; everything except its backbone and transformer layers stays eager.
        backend: of torch.compile; `aot_eager` traces and differentiates but generates no code.
    """
    options = OPTIONS if backend == "inductor" else None
    for region in regions(model):
        region.compile(dynamic=True, backend=backend, options=options)


def regions(model: Detector) -> list[nn.Module]:
    """The modules that are compiled separately; with `model.norm_valid` without the backbone.

    For its masked norms torch 2.14 generates no code with symbolic sizes: it fails, or does not end.
    """
    backbone = [] if model.config.norm_valid else [model.get_submodule("backbone")]
    return [*backbone, *(m for m in model.modules() if isinstance(m, FeedForward))]

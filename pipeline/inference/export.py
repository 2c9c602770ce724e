"""Export of a trained detector as one graph that needs no code of this project: ONNX, or a torch.export archive.

The graph contains normalisation, padding mask, network and top-k. It accepts any number of images of any size, or of
one size if a runtime needs that (TensorRT's fast plans, NPUs). The operator is decomposed, see `model.ops.gather`. An
archive can keep it for programs that import `pipeline.model.ops` for its speed. Every file is read back, run and
compared with the model before it replaces an older one. Raises ExportError, StorageError.
"""

import copy
import importlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram

from pipeline.checkpoint import Inference
from pipeline.data.batch import MEAN, STD
from pipeline.errors import ExportError, storage_error
from pipeline.files.atomic import replace_file
from pipeline.model import Detector
from pipeline.model.attention import MSDeformAttn
from pipeline.model.ops.sampling import EXPORTED
from pipeline.model.postprocess import top_detections

INPUTS, OUTPUTS = ("images", "sizes"), ("scores", "labels", "boxes_xyxy")
KINDS = ("deformable_detr", "detr")
OPSET = 19  # the first with deformable convolutions (DCN backbones)
MAX_SIDE = 8192  # pixels
TOLERANCE = 1e-3  # largest difference of scores, and of boxes relative to the image
AGREEMENT = 0.99  # smallest share of equal detections, because two candidates for the last rank may be swapped


class Graph(nn.Module):
    """The exported graph: from padded images to detections."""

    def __init__(self, model: Detector, top_k: int) -> None:
        super().__init__()
        self.model, self.top_k = model, top_k

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: uint8 [N, 3, H, W], RGB, resized as in evaluation; the padding, right and below, is ignored.
            sizes: int64 [N, 2], height and width of each image without its padding.

        Returns:
            `scores` float32 [N, K], `labels` int64 [N, K], and `boxes_xyxy` float32 [N, K, 4] relative to each
            image; multiplied by its original width and height they are in pixels. K is `top_k`, or less if the model
            has fewer candidates. The best come first; those of a softmax head are in the order of the queries.
        """
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)[:, None] >= sizes[:, 0, None, None]
        mask = rows | (torch.arange(width, device=images.device) >= sizes[:, 1, None, None])
        mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
        pixels = ((images.float() / 255 - mean) / std).masked_fill(mask[:, None], 0.0)
        return top_detections(self.model(pixels, mask), torch.ones_like(sizes), self.top_k)


@dataclass(frozen=True)
class Exported:
    """A traced detector."""

    program: ExportedProgram
    eager: Graph  # the module that was traced, with the operator's kernels
    axes: dict[int, str]  # the axes of `images` that may have any length
    trials: tuple[tuple[Tensor, Tensor], ...]  # inputs for the comparison with `eager`
    properties: dict[str, str]  # see `describe`


def trace(inference: Inference, top_k: int, size: tuple[int, int] | None = None, keep_op: bool = False) -> Exported:
    """The graph of a detector, traced on the CPU.

    Args:
        inference: its model is not changed.
        top_k: detections per image.
        size: (height, width) of all images; None allows any size that the model accepts, up to MAX_SIDE.
        keep_op: keep the operator instead of decomposing it.

    Raises:
        ExportError: the detector is not a set predictor, the size is out of bounds, or there is no operator to keep.
    """
    kind = inference.config.model.name
    if kind not in KINDS:
        raise ExportError(f"model.name={kind} cannot be exported: only set predictors can ({', '.join(KINDS)})")
    least = _least_side(inference)
    if size is None:
        least += 1  # the tracer treats the size of a map of one pixel as a constant
    elif min(size) < least:
        raise ExportError(f"this model needs images of at least {least}x{least} px, not {size[0]}x{size[1]}")
    elif max(size) > MAX_SIDE:
        raise ExportError(f"images of {size[0]}x{size[1]} px are too large: no side may exceed {MAX_SIDE} px")
    model = copy.deepcopy(inference.model).cpu().eval()  # frozen weights would make torch fix the batch size
    eager = Graph(copy.deepcopy(model), top_k).eval()
    for module in model.modules():
        if isinstance(module, MSDeformAttn):
            module.impl = "auto" if keep_op else EXPORTED
    trials = [_noise(size, size), _noise(size)] if size else _any_sizes(least)
    dims = {name: Dim(name, min=least, max=MAX_SIDE) for name in ("height", "width")}
    dims["batch"] = Dim("batch", min=1, max=1024)
    axes = {0: "batch"} if size else {0: "batch", 2: "height", 3: "width"}
    shapes = {"images": {axis: dims[name] for axis, name in axes.items()}, "sizes": {0: dims["batch"]}}
    try:
        program = torch.export.export(Graph(model, top_k).eval(), trials[0], dynamic_shapes=shapes, strict=False)
    except UserError as error:  # a network whose layers depend on the size, such as BiFPN
        reason = str(error).splitlines()[0]
        raise ExportError(f"this model cannot be exported for any image size, give one (--size): {reason}") from error
    if keep_op and "deformable_detr.ms_deform_attn" not in program.graph_module.code:
        raise ExportError("there is no operator to keep; `python -m jobs.doctor` says why it does not build")
    return Exported(program, eager, axes, tuple(trials), describe(inference))


def write_onnx(exported: Exported, path: Path) -> float:
    """Write a decomposed graph as ONNX, then compare onnxruntime's results with the model's.

    Returns:
        The share of detections that agree with the model's.

    Raises:
        ExportError: the extra `export` is not installed, or the file computes something else.
        StorageError: the file cannot be written.
    """
    onnx, onnxruntime = _package("onnx"), _package("onnxruntime")
    _package("onnxscript")
    for name in ("onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they log every node that they change
    graph = torch.onnx.export(
        exported.program,
        dynamo=True,
        opset_version=OPSET,
        input_names=INPUTS,
        output_names=OUTPUTS,
        dynamic_shapes={"images": exported.axes, "sizes": {}},  # only for the axes' names
        verbose=False,
    )
    assert graph is not None
    proto = graph.model_proto
    onnx.helper.set_model_props(proto, exported.properties)
    with _write_file(path) as temporary:
        onnx.save_model(proto, temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])

        def run(images: Tensor, sizes: Tensor) -> Sequence[Tensor]:
            given = dict(zip(INPUTS, (images.numpy(), sizes.numpy()), strict=True))
            return [torch.from_numpy(output) for output in session.run(list(OUTPUTS), given)]

        return check(run, exported)


def write_archive(exported: Exported, path: Path) -> float:
    """Write a graph as `torch.export.save` does, read it back and compare. Returns and raises as `write_onnx`."""
    packed = io.BytesIO()  # torch's own writer ends the process if the disk is full
    with _write_file(path) as temporary:
        torch.export.save(exported.program, packed, extra_files=exported.properties)
        temporary.write_bytes(packed.getvalue())  # an error that keeps a view of the buffer crashes garbage collection
        return check(torch.export.load(temporary).module(), exported)


def check(run: Callable[[Tensor, Tensor], Sequence[Tensor]], exported: Exported) -> float:
    """The share of the trials' detections that `run` also finds. Raises ExportError if it is too small."""
    shares = []
    for images, sizes in exported.trials:
        with torch.no_grad():
            scores, labels, boxes = exported.eager(images, sizes)
        found = run(images, sizes)
        # A detection may have another rank if scores differ by less than rounding.
        near = (scores[:, :, None] - found[0][:, None]).abs() < TOLERANCE
        near &= labels[:, :, None] == found[1][:, None]
        near &= ((boxes[:, :, None] - found[2][:, None]).abs() < TOLERANCE).all(-1)
        shares.append(near.any(-1).float().mean().item())
    share = min(shares)
    if share < AGREEMENT:
        raise ExportError(
            f"the exported graph finds {share:.1%} of the model's detections, so it is wrong; nothing was written. "
            "Please report this with the versions of torch and onnxruntime"
        )
    return share


def describe(inference: Inference) -> dict[str, str]:
    """Metadata for programs that run the graph, as JSON by key; it is stored inside the file."""
    config, raw = inference.config, inference.config.data.labels == "raw"
    by_label = {c.id if raw else label: c for label, c in enumerate(inference.categories)}
    augment = config.data.augment
    return {
        "names": json.dumps({label: category.name for label, category in by_label.items()}),
        "category_ids": json.dumps({label: category.id for label, category in by_label.items()}),
        "shortest_side": json.dumps(augment.eval_size),  # of images in the evaluation, in pixels
        "longest_side": json.dumps(augment.max_size),
        "model": config.model.model_dump_json(),
    }


def _least_side(inference: Inference) -> int:
    """Smallest side of an image, a multiple of the deepest stride. Two-stage models need a token for every query."""
    config, stride = inference.config.model, inference.model.stride
    side = stride
    while config.two_stage and sum((side * 2**level // stride) ** 2 for level in range(config.levels)) < config.queries:
        side += stride
    return side


def _noise(size: tuple[int, int], *smaller: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A batch of noise padded to `size`: one image that fills it, and further smaller ones."""
    height, width = size
    sizes = torch.tensor([size, *((h * 3 // 4, w * 5 // 6) for h, w in smaller)])
    images = torch.randint(0, 256, (len(sizes), 3, height, width), generator=torch.Generator().manual_seed(height))
    return images.to(torch.uint8), sizes


def _any_sizes(least: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes and different numbers of images."""
    wide, tall = (least + 17, 2 * least + 40), (2 * least + 9, least + 30)
    return [_noise(wide, wide), _noise(tall, tall, tall), _noise((least, least))]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ExportError(f"ONNX needs {name}: python -m pip install onnx onnxruntime onnxscript") from None


@contextmanager
def _write_file(path: Path) -> Iterator[Path]:
    try:
        with replace_file(path) as temporary:
            yield temporary
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}; free space there, or choose another file"
        raise storage_error(message, error) from None

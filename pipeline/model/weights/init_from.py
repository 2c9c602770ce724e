"""Loads the weights of a file into a model: all of them, or for fine-tuning all that fit.

`start_from` is for `model.init_from`; every rank calls it, because DeepSpeed does not broadcast buffers. `load_exactly`
is for imported weights. A file of another variant of the model is a CheckpointError with a report.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.detector import Detector
from pipeline.model.weights.files import WeightFile
from pipeline.model.weights.hugging_face import to_published
from pipeline.model.weights.published import STRAY, check_fit, load_official, load_strict, shorten_list

ADVICE = (
    "give the preset and the model.* settings of these weights, or other weights: `python -m jobs.weights list` says "
    "which preset a published file fits"
)
_HEAD = re.compile(r"(class_embed|bbox_embed)\.")


def load_exactly(model: Detector, file: WeightFile) -> None:
    """Fill the model with a file of the same variant and the same classes.

    Raises:
        CheckpointError: weights do not fit; the message lists all, and the model is unchanged.
    """
    try:
        if file.layout == "own":
            load_strict(model, file.tensors, "own layout")
        elif file.layout == "published":
            load_official(model, file.tensors)
        else:
            load_official(model, to_published(file.tensors))
    except CheckpointError as error:
        raise CheckpointError(_describe(file, error)) from None


def start_from(model: Detector, file: WeightFile, resizable: Collection[str]) -> str:
    """Load every tensor that fits. Tensors that depend on the data, and heads that the file lacks, keep their values.

    Args:
        model: freshly built.
        file: weights of the same variant, perhaps for other classes or another number of queries.
        resizable: keys of the model's state_dict whose shape depends on the number of classes or of queries.

    Returns:
        A report of the loaded, new and unused tensors.

    Raises:
        CheckpointError: other tensors are missing, unexpected, of another shape or not finite; the model is unchanged.
    """
    own = model.state_dict()
    try:
        given = _own_names(file)
        new = {key for key in resizable if key in given and given[key].shape != own[key].shape}
        new |= {key for key in own if key not in given and _HEAD.match(key)}
        dropped = {key for key in given if key not in own and _HEAD.match(key)}
        wanted = {key: tensor.shape for key, tensor in own.items() if key not in new}
        kept = {key: tensor for key, tensor in given.items() if key not in new | dropped}
        check_fit(f"{file.layout} layout", wanted, kept)
    except CheckpointError as error:
        raise CheckpointError(f"model.init_from: {_describe(file, error)}\n  {ADVICE}") from None
    check_finite(f"model.init_from: {file.source}", kept)
    model.load_state_dict(kept, strict=False)
    changes = [
        f"{key} ({list(given[key].shape)} in the file, {list(own[key].shape)} here)" if key in given else key
        for key in own
        if key in new
    ]
    lines = [f"model.init_from={file.source}: {len(kept)} of {len(own)} tensors loaded"]
    lines += [f"new: {shorten_list(changes)}"] if changes else []
    lines += [f"left out: {shorten_list(sorted(dropped))}"] if dropped else []
    return "\n  ".join(lines)


def check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights from which nothing can be learned or detected. Raises CheckpointError, which names `source`."""
    bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(f"{source} has numbers that are not finite in {shorten_list(bad)}; use other weights")


def _own_names(file: WeightFile) -> dict[str, Tensor]:
    """The file's tensors under this project's names, each once; tensors without a counterpart keep their names."""
    if file.layout == "own":
        return file.tensors
    tensors = to_published(file.tensors) if file.layout == "hugging_face" else file.tensors
    own = {_own_name(key): tensor for key, tensor in tensors.items() if key.rpartition(".")[2] not in STRAY}
    if any(key.startswith("transformer.decoder.bbox_embed.") for key in tensors):  # every layer has its own heads
        return own
    return {key: tensor for key, tensor in own.items() if not re.match(r"(class_embed|bbox_embed)\.[1-9]", key)}


def _own_name(key: str) -> str:
    if key.startswith("backbone.0."):
        return key.replace("backbone.0.", "backbone.", 1)
    head = key.removeprefix("transformer.decoder.")
    return head if _HEAD.match(head) else key


def _describe(file: WeightFile, error: CheckpointError) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in file.variant.items())
    names = {"own": "", "published": "", "hugging_face": " (Hugging Face; here under the published names)"}[file.layout]
    return f"{file.source}{names}: {error}" + (f"\n  the file's own settings: {settings}" if settings else "")

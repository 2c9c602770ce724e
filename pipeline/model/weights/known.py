"""Published weights that `model.init_from` or `model.backbone.weights` can take: where they are, and what a file is.

A downloaded file is recognised by the digest that its publisher put into its name (the first characters of its sha256,
as torch's hub checks them), never by the name alone. Files without such a digest are recognised by what is in them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.model.weights.files import file_digest, read_weights
from pipeline.runs.record import list_runs

DIGEST = re.compile(r"-(?P<digest>[0-9a-f]{8})\.(?:pth|pt)\Z")
_ZOO = "https://github.com/fundamentalvision/Deformable-DETR (links in the table of its README)"
_FACEBOOK = "https://dl.fbaipublicfiles.com/detr/"
_TORCHVISION = "https://download.pytorch.org/models/"
_HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class KnownFile:
    """A published file."""

    name: str
    setting: str  # that takes it
    model: str  # preset and overrides that it fits
    where: str

    @property
    def digest(self) -> str:
        """The beginning of its sha256 by its name; empty if the name has none."""
        match = DIGEST.search(self.name)
        return match["digest"] if match else ""


_STEM, _INIT, _BODY = "r50_deformable_detr", "model.init_from", "model.backbone.weights"
KNOWN = (
    KnownFile(f"{_STEM}-checkpoint.pth", _INIT, "r50_deformable", _ZOO),
    KnownFile(f"{_STEM}_plus_iterative_bbox_refinement-checkpoint.pth", _INIT, "finetune_r50", _ZOO),
    KnownFile(
        f"{_STEM}_plus_iterative_bbox_refinement_plus_plus_two_stage-checkpoint.pth",
        _INIT,
        "finetune_r50 model.two_stage=true",
        _ZOO,
    ),
    KnownFile(f"{_STEM}_single_scale-checkpoint.pth", _INIT, "r50_deformable_single_scale", _ZOO),
    KnownFile(f"{_STEM}_single_scale_dc5-checkpoint.pth", _INIT, "r50_deformable_single_scale_dc5", _ZOO),
    KnownFile("model.safetensors", _INIT, "r50_deformable", f"{_HUB}SenseTime/deformable-detr"),
    KnownFile("model.safetensors", _INIT, "finetune_r50", f"{_HUB}SenseTime/deformable-detr-with-box-refine"),
    KnownFile(
        "model.safetensors",
        _INIT,
        "finetune_r50 model.two_stage=true",
        f"{_HUB}SenseTime/deformable-detr-with-box-refine-two-stage",
    ),
    KnownFile("detr-r50-e632da11.pth", _INIT, "r50_detr", f"{_FACEBOOK}detr-r50-e632da11.pth"),
    KnownFile("detr-r50-dc5-f0fb7ef5.pth", _INIT, "r50_detr_dc5", f"{_FACEBOOK}detr-r50-dc5-f0fb7ef5.pth"),
    KnownFile(
        "resnet50-0676ba61.pth", _BODY, "any preset with resnet50 (imagenet)", f"{_TORCHVISION}resnet50-0676ba61.pth"
    ),
    KnownFile(
        "resnet50-11ad3fa6.pth",
        _BODY,
        "any preset with resnet50 (IMAGENET1K_V2)",
        f"{_TORCHVISION}resnet50-11ad3fa6.pth",
    ),
    KnownFile(
        "resnet101-63fe2227.pth", _BODY, "any preset with resnet101 (imagenet)", f"{_TORCHVISION}resnet101-63fe2227.pth"
    ),
)


def identify(path: Path) -> str:
    """What a file is, in one line: by its digest if its publisher gives one, else by its content.

    Raises:
        CheckpointError: it is damaged, or holds no weights that can be read.
    """
    try:
        digest = file_digest(path) if path.is_file() else None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if digest is not None:
        for known in KNOWN:
            if known.digest and digest.startswith(known.digest):
                return f"{known.name}, complete (sha256 {digest[:16]}): {known.setting}={path} with {known.model}"
        if any(known.digest and known.name == path.name for known in KNOWN):
            raise CheckpointError(f"{path} is damaged or renamed: its sha256 is {digest[:16]}...; download it again")
    file = read_weights(str(path))
    settings = ", ".join(f"{key}={value}" for key, value in file.variant.items())
    about = f", for {settings}" if settings else ""
    return f"{file.layout.replace('_', ' ')} layout, {len(file.tensors)} tensors{about}: model.init_from={path}"


def list_weights(files: Sequence[str], storage: str) -> list[str]:
    """What the given files are; without files what is published and the runs in `storage`, in two lines each.

    Raises:
        CheckpointError: see `identify`.
    """
    if files:
        return [f"{path}: {identify(Path(path))}" for path in files]
    rows = [(known.name, f"{known.setting} with {known.model}; from {known.where}") for known in KNOWN]
    rows += [(run.folder, f"model.init_from, AP {run.metrics['val/AP']:.3f}") for run in list_runs(storage)]
    return [line for name, text in rows for line in (name, f"    {text}")]

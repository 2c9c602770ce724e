"""The sections `model` and `loss`: which detector is built, and what it is trained for."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Auto, Location, LocationMark, NonNegative, Section, Share, resolved

DETECTORS = Literal["deformable_detr", "detr", "faster_rcnn", "fcos", "atss", "efficientdet"]
BACKBONES = Literal[
    "resnet50",
    "resnet101",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "conv5",
]
# What a detector does not read; setting it is an error, because it would promise something.
_DEFORMABLE = ("levels", "enc_points", "dec_points", "cross_level", "refine", "two_stage", "op", "merge_layers")
_TRANSFORMER = ("heads", "enc_layers", "dec_layers", "ffn_dim", "dropout", "queries", "checkpoint_encoder")
_SET_PREDICTION = ("class_head", *_TRANSFORMER, *_DEFORMABLE)
_UNREAD: dict[str, tuple[str, ...]] = {
    "deformable_detr": ("head_layers",),
    "detr": ("neck", "neck_layers", "head_layers", *_DEFORMABLE),
    "faster_rcnn": ("norm_valid", "neck", "neck_layers", "head_layers", *_SET_PREDICTION),
    "fcos": ("norm_valid", "neck", "neck_layers", *_SET_PREDICTION),
    "atss": ("norm_valid", "neck", "neck_layers", *_SET_PREDICTION),
    "efficientdet": ("norm_valid", "neck", *_SET_PREDICTION),
}


class BackboneConfig(Section):
    """The convolutional trunk."""

    name: BACKBONES = "resnet50"
    """Network that turns an image into feature maps. `conv5` has five small stages and is for the demo."""

    weights: Annotated[Location, LocationMark(("imagenet", "none"), r"\w+")] = Field("imagenet", min_length=1)
    """Weights the backbone starts from: `imagenet` (torchvision's IMAGENET1K_V1), another name that torchvision has,
    a local file, or `none`."""

    norm: Literal["frozen_batch", "group"] = "frozen_batch"
    """Normalisation: `frozen_batch` keeps the statistics of pretrained weights.
    Use `group` with `model.backbone.weights: none`."""

    dilation: bool = False
    """DC5: the last stage keeps the resolution of the one before, with dilated convolutions.
    Small objects gain AP; time and memory grow. For ResNets and ResNeXts."""

    deformable_conv: bool = False
    """DCN: modulated deformable 3x3 convolutions in stages 3 to 5, for more AP and time.
    For ResNets and ResNeXts."""

    width: int = Field(32, ge=8, le=4096)
    """Channels of the first stage of `conv5`; other backbones ignore it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("dilation", "deformable_conv"):
            if getattr(self, field) and not self.name.startswith(("resnet", "resnext")):
                raise ValueError(f"{field} is defined for ResNets and ResNeXts, not for name={self.name}; leave it out")
        return self


class ModelConfig(Section):
    """A detector; the defaults are the published multi-scale Deformable DETR."""

    name: DETECTORS = "deformable_detr"
    """Detector to build. `loss.classification` must fit: `softmax` or `focal` for `detr`, `focal` for
    `deformable_detr`, `own` for the others."""

    num_classes: Annotated[int, Field(ge=1, le=100_000)] | Auto = 80
    """Number of classes, as many as the data has categories. `auto` counts them when the run first starts.
    91 with `data.labels: raw` for published weights."""

    class_head: Literal["sigmoid", "softmax"] = "sigmoid"
    """How classes are scored: `sigmoid` each by itself; `softmax`, for `detr`, with one more logit for "no object"."""

    hidden_dim: int = Field(256, ge=8, le=8192)
    """Channels of the transformer, or of the feature pyramid of the other detectors.
    A multiple of 4 and of `model.heads`; smaller is faster and less accurate."""

    heads: int = Field(8, ge=1, le=1024)
    """Attention heads of each layer."""

    enc_layers: int = Field(6, ge=1, le=100)
    """Layers of the transformer's encoder. Fewer are faster and less accurate."""

    dec_layers: int = Field(6, ge=1, le=100)
    """Layers of the transformer's decoder. Fewer are faster and less accurate."""

    ffn_dim: int = Field(1024, ge=1, le=65_536)
    """Hidden channels of the feed-forward part of each transformer layer."""

    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability in the transformer. Use 0 for small models and short trainings."""

    queries: int = Field(300, ge=1, le=100_000)
    """Object queries, each of which predicts one box. Use clearly more than an image has objects."""

    levels: int = Field(4, ge=1, le=10)
    """Feature levels that deformable attention samples; each next one has half the resolution.
    1 takes C5 alone. Fewer are faster and lose small objects."""

    enc_points: int = Field(4, ge=1, le=100)
    """Points that each head of the encoder samples per level (the paper's K)."""

    dec_points: int = Field(4, ge=1, le=100)
    """Points that each head of the decoder samples per level (the paper's K)."""

    cross_level: bool = True
    """Multi-scale attention. With false an encoder query samples only its own level (Table 2 of the paper)."""

    neck: Literal["none", "fpn", "bifpn"] = "none"
    """Pyramid that mixes the levels before the transformer; it needs `model.levels` of 2 or more.
    In the paper it adds nothing to multi-scale attention."""

    neck_layers: int = Field(3, ge=1, le=100)
    """Repetitions of a BiFPN, of `model.neck: bifpn` or of `efficientdet`."""

    head_layers: int = Field(4, ge=1, le=100)
    """Convolutions before each output of a dense head: FCOS, ATSS, EfficientDet."""

    refine: bool = False
    """Iterative bounding box refinement: each decoder layer corrects the box of the one before.
    More AP at almost no cost."""

    two_stage: bool = False
    """The encoder proposes the boxes that the decoder starts from. More AP; needs `model.refine: true`."""

    op: Literal["auto", "cuda", "cpu", "torch"] = "auto"
    """Implementation of deformable attention; `auto` takes the fastest that the device has.
    `torch` needs no compiler. The results agree to rounding."""

    checkpoint_encoder: bool = False
    """Keep no activations of the encoder's layers, and compute them again in the backward pass.
    Saves memory, costs time."""

    merge_layers: bool = False
    """Compute at once what layers of the decoder share: values of the memory and, without `model.refine`, the heads.
    Fewer and larger products for a GPU. It changes results by rounding only."""

    norm_valid: bool = False
    """Norms leave out padding and nothing reads it, so an image's result does not depend on its batch.
    For models trained from nothing; published models and their weights have padding in their arithmetic."""

    init_from: Location = ""
    """Weights to start from: a run, a checkpoint, a published .pth or a Hugging Face file. Empty starts new.
    The layers of other classes start new. `python -m jobs.weights list` shows files."""

    freeze: tuple[Literal["backbone", "encoder"], ...] = ()
    """Parts whose weights stay as they start: `backbone`, and `encoder`, the transformer's.
    For fine-tuning on few images: it saves time and memory, and fewer weights can overfit."""

    backbone: BackboneConfig = BackboneConfig()

    @property
    def classes(self) -> int:
        """The number of classes. Raises ConfigError while it is `auto`."""
        return resolved(self.num_classes, "model.num_classes")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of heads {self.heads}")
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of 4 (sine positions)")
        for field in _UNREAD[self.name]:
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field} means nothing for model.name={self.name}; leave it out")
        if self.backbone.dilation and self.name not in ("detr", "deformable_detr"):
            raise ValueError(f"backbone.dilation: true is not for {self.name}, whose pyramid halves at every level")
        if self.name in ("fcos", "atss") and self.hidden_dim % 32:
            raise ValueError(
                f"hidden_dim {self.hidden_dim} must be a multiple of 32, the groups of {self.name}'s norms"
            )
        if self.neck != "none" and self.levels < 2:
            raise ValueError(f"neck: {self.neck} mixes levels, and levels: {self.levels} leaves nothing to mix; use 2+")
        repeated = self.neck_layers != type(self).model_fields["neck_layers"].default
        if self.name == "deformable_detr" and self.neck != "bifpn" and repeated:
            raise ValueError("neck_layers counts the repetitions of neck: bifpn; leave it out")
        if self.norm_valid and self.neck != "none":
            raise ValueError(f"norm_valid: true is not for neck: {self.neck}, which mixes padding into its levels")
        if self.norm_valid and self.backbone.name.startswith("efficientnet"):
            raise ValueError("norm_valid: true is for conv5 and ResNets; EfficientNet's squeezes average over padding")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine: true (its decoder starts from boxes that are refined)")
        if self.freeze and not self.init_from and (self.backbone.weights == "none" or "encoder" in self.freeze):
            raise ValueError(
                f"freeze: [{', '.join(self.freeze)}] keeps weights that were not trained; give init_from, the weights "
                "to start from"
            )
        if "encoder" in self.freeze and self.name not in ("deformable_detr", "detr"):
            raise ValueError(f"freeze: encoder is the transformer's, which {self.name} does not have; freeze backbone")
        if self.class_head == "softmax" and self.name != "detr":
            raise ValueError(f"class_head: softmax is defined for model.name=detr only, not for {self.name}")
        return self


class LossConfig(Section):
    """Weights of the set criterion and costs of the matcher."""

    classification: Literal["focal", "softmax", "own"] = "focal"
    """Class loss: `focal` for sigmoid heads, `softmax` for cross entropy with "no object".
    `own` is for the baselines, which bring their own losses."""

    class_weight: NonNegative = 2.0
    """Weight of the class loss in the total loss."""

    bbox_weight: NonNegative = 5.0
    """Weight of the L1 loss of boxes in the total loss."""

    giou_weight: NonNegative = 2.0
    """Weight of the GIoU loss of boxes in the total loss."""

    class_cost: NonNegative = 2.0
    """Weight of the class in the matching of queries to objects."""

    bbox_cost: NonNegative = 5.0
    """Weight of the L1 distance of boxes in the matching of queries to objects."""

    giou_cost: NonNegative = 2.0
    """Weight of the GIoU of boxes in the matching of queries to objects."""

    focal_alpha: Share = 0.25
    """Weight of positives in the focal loss; negatives have 1 minus it."""

    focal_gamma: float = Field(2.0, ge=0, le=100)
    """Exponent of the focal loss: the higher, the less easy examples count."""

    no_object_weight: NonNegative = 0.1
    """Weight of the class "no object" in softmax cross entropy; most queries have that class."""

    aux: bool = True
    """Add the same losses after every decoder layer. False trains the last layer alone."""

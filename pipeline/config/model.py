"""The sections `model` and `loss`: which detector is built, and what it is trained for."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import Location, LocationMark, NonNegative, Section, Share

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
_DEFORMABLE = ("levels", "enc_points", "dec_points", "cross_level", "refine", "two_stage", "op")
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

    name: BACKBONES = "resnet50"  # conv5: five small stages, for the demo
    # imagenet (= IMAGENET1K_V1), another name that torchvision has, a local file, or none
    weights: Annotated[Location, LocationMark(("imagenet", "none"), r"\w+")] = Field("imagenet", min_length=1)
    norm: Literal["frozen_batch", "group"] = "frozen_batch"  # group: for training from nothing
    dilation: bool = False  # DC5: the last stage keeps the resolution of the one before, with dilated convolutions
    deformable_conv: bool = False  # modulated deformable 3x3 convolutions in stages 3 to 5 (DCN)
    width: int = Field(32, ge=8, le=4096)  # channels of conv5's first stage; the others ignore it

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for field in ("dilation", "deformable_conv"):
            if getattr(self, field) and not self.name.startswith(("resnet", "resnext")):
                raise ValueError(f"{field} is defined for ResNets and ResNeXts, not for name={self.name}; leave it out")
        return self


class ModelConfig(Section):
    """A detector; the defaults are the published multi-scale Deformable DETR."""

    name: DETECTORS = "deformable_detr"
    num_classes: int = Field(80, ge=1, le=100_000)  # 91 with `data.labels: raw` for published weights
    class_head: Literal["sigmoid", "softmax"] = "sigmoid"  # softmax: with one more logit, for "no object" (DETR)
    hidden_dim: int = Field(256, ge=8, le=8192)  # of the transformer, or of a baseline's feature pyramid
    heads: int = Field(8, ge=1, le=1024)
    enc_layers: int = Field(6, ge=1, le=100)
    dec_layers: int = Field(6, ge=1, le=100)
    ffn_dim: int = Field(1024, ge=1, le=65_536)
    dropout: float = Field(0.1, ge=0, lt=1)
    queries: int = Field(300, ge=1, le=100_000)
    levels: int = Field(4, ge=1, le=10)
    enc_points: int = Field(4, ge=1, le=100)
    dec_points: int = Field(4, ge=1, le=100)
    cross_level: bool = True  # multi-scale attention; False: an encoder query samples only its own level
    neck: Literal["none", "fpn", "bifpn"] = "none"  # mixes the levels before the transformer
    neck_layers: int = Field(3, ge=1, le=100)  # repetitions of a BiFPN
    head_layers: int = Field(
        4, ge=1, le=100
    )  # convolutions before each output of a dense head: FCOS, ATSS, EfficientDet
    refine: bool = False  # iterative bounding box refinement
    two_stage: bool = False  # proposals from the encoder; needs refine
    op: Literal["auto", "cuda", "cpu", "torch"] = "auto"  # implementation of MSDeformAttn
    checkpoint_encoder: bool = False  # keep no activations of encoder layers, compute them again in the backward
    # Norms count no padding and nothing reads it, so that an image's result is the same alone and in any batch. For
    # models that train from nothing: the published ones, and their weights, have padding in their arithmetic.
    norm_valid: bool = False
    init_from: Location = (
        ""  # weights to start from: run, checkpoint, published .pth, Hugging Face; other classes stay new
    )
    backbone: BackboneConfig = BackboneConfig()

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
        if self.class_head == "softmax" and self.name != "detr":
            raise ValueError(f"class_head: softmax is defined for model.name=detr only, not for {self.name}")
        return self


class LossConfig(Section):
    """Weights of the set criterion and costs of the matcher."""

    # focal: for sigmoid heads; softmax: cross entropy with "no object"; own: the baselines bring their own losses
    classification: Literal["focal", "softmax", "own"] = "focal"
    class_weight: NonNegative = 2.0
    bbox_weight: NonNegative = 5.0
    giou_weight: NonNegative = 2.0
    class_cost: NonNegative = 2.0
    bbox_cost: NonNegative = 5.0
    giou_cost: NonNegative = 2.0
    focal_alpha: Share = 0.25
    focal_gamma: float = Field(2.0, ge=0, le=100)
    no_object_weight: NonNegative = 0.1  # of the class "no object" in softmax cross entropy
    aux: bool = True  # the same losses after every decoder layer

"""The `data.augment` section: the published augmentation, what can be added to it, and the presets of the latter."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pipeline.config.base import Section, Share, Side

Change = Annotated[float, Field(ge=0, le=1)]
Zoom = Annotated[float, Field(ge=0.1, le=10)]


def check_order(pair: tuple[Any, Any]) -> tuple[Any, Any]:
    """The pair; raises ValueError if it is reversed."""
    if pair[0] > pair[1]:
        raise ValueError("is reversed; give [smallest, largest]")
    return pair


@dataclass(frozen=True)
class Extras:
    """What is added to the published augmentation, with the preset's values where a setting has none of its own."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: float = 2.0
    noise: float = 0.0
    noise_level: float = 12.0
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    affine: float = 0.0
    rotate: float = 10.0
    translate: float = 0.1
    zoom: tuple[float, float] = (0.8, 1.25)
    shear: float = 2.0
    mosaic: float = 0.0
    copy_paste: float = 0.0
    paste_boxes: int = 3
    min_visible: float = 0.2

    @property
    def turns(self) -> bool:
        """Whether images may be turned or flipped vertically."""
        return self.vertical_flip > 0 or self.quarter_turns > 0

    @property
    def colours(self) -> bool:
        """Whether colours may change."""
        return max(self.brightness, self.contrast, self.saturation, self.hue, self.grayscale, self.blur, self.noise) > 0

    @property
    def scenes(self) -> bool:
        """Whether an image may be warped, or get parts of others."""
        return max(self.affine, self.mosaic, self.copy_paste) > 0


Preset = Literal["published", "small", "strong", "none"]
_OFF = Extras()
PRESETS: dict[str, Extras] = {
    "published": _OFF,
    "none": _OFF,
    "small": Extras(
        brightness=0.2,
        contrast=0.2,
        saturation=0.3,
        hue=0.02,
        affine=0.5,
        rotate=5.0,
        translate=0.05,
        zoom=(0.8, 1.25),
        shear=2.0,
    ),
    "strong": Extras(
        brightness=0.4,
        contrast=0.4,
        saturation=0.5,
        hue=0.04,
        grayscale=0.05,
        blur=0.1,
        noise=0.1,
        affine=0.7,
        rotate=10.0,
        translate=0.1,
        zoom=(0.6, 1.5),
        shear=4.0,
        mosaic=0.4,
        copy_paste=0.3,
    ),
}


class AugmentConfig(Section):
    """Training augmentation (reference recipe: Deformable DETR, COCO) and the evaluation size. Sizes in pixels.

    From `brightness` on, settings without a value have that of `data.augment.preset`. A share is a probability.
    """

    preset: Preset = "published"
    """Training augmentation in one word: `published` flips, resizes and crops; `small` adds moderate changes of
    colour and position, for hundreds or a few thousand images; `strong` adds larger ones, mosaics and pasted
    objects; `none` resizes as evaluation does, and does not read `flip`, `scales` and `crop`."""

    flip: Share = 0.5
    """Probability that a training image is mirrored left to right.
    Set 0 where left and right differ in meaning, as in text."""

    scales: Annotated[tuple[Side, ...], Field(min_length=1)] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shortest sides in pixels that training images are resized to; one is drawn for each.
    Smaller ones save time and memory and cost AP of small objects."""

    max_size: Side = 1333
    """Longest side in pixels after any resize to `data.augment.scales` or `data.augment.eval_size`."""

    crop: Share = 0.5
    """Probability that a training image is resized, cropped and resized again, instead of resized once."""

    crop_scales: Annotated[tuple[Side, ...], Field(min_length=1)] = (400, 500, 600)
    """Shortest sides in pixels before a crop; one is drawn for each cropped image."""

    crop_range: Annotated[tuple[Side, Side], AfterValidator(check_order)] = (384, 600)
    """Smallest and largest side of a crop in pixels."""

    resample: Literal["reference", "fused"] = "reference"
    """How training images are resized: `reference` as published, `fused` with one resample, about twice as fast.
    Use `fused` where training waits for data."""

    eval_size: Side = 800
    """Shortest side in pixels that images are resized to in evaluation and prediction."""

    brightness: Change | None = None
    """Largest relative change of brightness: 0.2 draws a factor from 0.8 to 1.2. 0 turns it off."""

    contrast: Change | None = None
    """Largest relative change of contrast around the mean grey of the image. 0 turns it off."""

    saturation: Change | None = None
    """Largest relative change of saturation; 1 may remove all colour. 0 turns it off."""

    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None
    """Largest turn of the colour circle; 0.5 is any colour. 0 turns it off.
    Keep it small where colour shows the class."""

    grayscale: Share | None = None
    """Probability that a training image loses its colour."""

    blur: Share | None = None
    """Probability that a training image is blurred, after its resize."""

    blur_sigma: Annotated[float, Field(ge=0.1, le=20)] | None = None
    """Largest standard deviation of `data.augment.blur` in pixels; smaller ones are as likely."""

    noise: Share | None = None
    """Probability that a training image gets noise, after its resize."""

    noise_level: Annotated[float, Field(ge=0, le=128)] | None = None
    """Largest standard deviation of `data.augment.noise` in grey levels of 255; smaller ones are as likely."""

    vertical_flip: Share | None = None
    """Probability that a training image is turned upside down by mirroring. For views from above, as of a
    microscope or a drone; no preset turns it on."""

    quarter_turns: Share | None = None
    """Probability that a training image is turned by 90, 180 or 270 degrees. No preset turns it on."""

    affine: Share | None = None
    """Probability that a training image is rotated, moved, zoomed and sheared within its frame. What comes in
    from outside is grey. A rotated box is the box around the rotated corners, so it is larger than its object."""

    rotate: Annotated[float, Field(ge=0, le=180)] | None = None
    """Largest angle of `data.augment.affine` in degrees, to either side."""

    translate: Annotated[float, Field(ge=0, le=0.9)] | None = None
    """Largest move of `data.augment.affine`, as a share of the side."""

    zoom: Annotated[tuple[Zoom, Zoom], AfterValidator(check_order)] | None = None
    """Smallest and largest factor of size of `data.augment.affine`; halving is as likely as doubling."""

    shear: Annotated[float, Field(ge=0, le=60)] | None = None
    """Largest angle of shear of `data.augment.affine` in degrees, in either direction of both axes."""

    mosaic: Share | None = None
    """Probability that a training image becomes one of four tiles of its frame; the others show images of the
    same shard."""

    copy_paste: Share | None = None
    """Probability that a training image gets objects of another image of its shard, cut out along their boxes."""

    paste_boxes: Annotated[int, Field(ge=1, le=100)] | None = None
    """Largest number of objects that `data.augment.copy_paste` adds to an image."""

    min_visible: Share | None = None
    """Share of a box that must stay visible in `affine`, `mosaic` and `copy_paste`. Boxes are cut at the edge; one
    with less of its area left is dropped. A paste that would hide more than the rest of a box is left out."""

    def extras(self) -> Extras:
        """The settings from `brightness` on, each with its own value or with the preset's."""
        preset = PRESETS[self.preset]
        own = {name: getattr(self, name) for name in Extras.__dataclass_fields__}
        return Extras(**{name: getattr(preset, name) if value is None else value for name, value in own.items()})


def describe_augmentation(augment: AugmentConfig) -> str:
    """The preset, and what is added to the published augmentation, in one line."""
    extras = {name: value for name, value in asdict(augment.extras()).items() if value != getattr(Extras(), name)}
    return ", ".join([augment.preset, *(f"{name} {value}" for name, value in extras.items())])

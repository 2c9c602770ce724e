"""The samples of a shard folder as a page to look through: as they are stored, and as training sees them.

The trained images are made by the loader's own code from the same settings, seed and epoch, so the page shows what a
run would get. Faults of the data are ShardErrors, an unknown class is a ConfigError.
"""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config import Config
from pipeline.config.augment import describe_augmentation
from pipeline.config.suggest import nearest
from pipeline.data.dataset import DetectionDataset
from pipeline.data.group import Request, make_group
from pipeline.data.plan import evaluated_samples
from pipeline.data.transforms import Views, draw_views
from pipeline.errors import ConfigError
from pipeline.evaluation.drawing import DrawnBox, class_colour, draw_boxes
from pipeline.pages.parts import Facts, Gallery, GalleryItem, ImageFile, Page, Part, Text
from pipeline.progress import Progress

LONGEST = 480  # pixels of the drawn images' longest side
QUALITY = 85  # of their JPEG
CROWD = (128, 128, 128)
EMPTY = "no boxes"


@dataclass(frozen=True)
class Choice:
    """Which samples a page shows."""

    images: int = 24
    epochs: int = 2  # of each image, as trained
    class_name: str = ""  # only images with this class


class Samples:
    """The samples of `data.train` as items of a gallery.

    Args:
        config: `data` and `seed` are used.
        choice: which samples.

    Raises:
        ShardError, ConfigError: see the module.
    """

    def __init__(self, config: Config, choice: Choice) -> None:
        self._config, self._choice = config, choice
        self.source = DetectionDataset(config.data.train, config.data.labels)
        self._names: Mapping[int, str] = {category.id: category.name for category in self.source.index.categories}
        self._by_label = {label: id_ for id_, label in self.source.index.labels(config.data.labels).items()}
        if choice.class_name and choice.class_name not in self._names.values():
            close = nearest(choice.class_name, self._names.values())
            raise ConfigError(
                f"--class {choice.class_name}: {config.data.train} has no such class; did you mean '{close}'?"
            )
        sizes, augment = self.source.index.sizes(), config.data.augment
        self._views: list[Views] = [draw_views(sizes, config.seed, epoch, augment) for epoch in range(choice.epochs)]
        self.extras = augment.extras()

    def items(self) -> list[GalleryItem]:
        """The chosen samples, in equal distances over the shards."""
        samples = self._chosen()
        made = []
        with Progress(len(samples), "drawing", "image") as progress:
            for i in samples:
                made.append(self._item(i))
                progress.advance()
        return made

    def _chosen(self) -> list[int]:
        known = np.arange(len(self.source))
        if name := self._choice.class_name:
            known = np.array([i for i in known.tolist() if any(box.name == name for box in self._boxes(i))], np.int64)
        chosen: list[int] = known[evaluated_samples(len(known), self._choice.images)].tolist()
        return chosen

    def _item(self, i: int) -> GalleryItem:
        index = self.source.index
        stored = self._boxes(i)
        classes = Counter(box.name for box in stored)
        shard = index.shards[int(index.samples.shard[i])].name
        height, width = self.source.size(i)
        what = ", ".join(f"{count} {name}" for name, count in sorted(classes.items())) or EMPTY
        images = [self._stored(i, stored), *(self._trained(i, epoch) for epoch in range(self._choice.epochs))]
        caption = f"{index.samples.image_id[i]:012d}, {width} x {height}: {what}"
        return GalleryItem(caption, images, [sorted(classes) or [EMPTY], [shard]])

    def _boxes(self, i: int) -> list[DrawnBox]:
        """Every annotation of sample i."""
        try:
            return [self._box(each) for each in self.source.read_annotations(i)["annotations"]]
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise self.source.fault(i, f"has a malformed annotation ({error!r})") from None

    def _box(self, annotation: dict[str, Any]) -> DrawnBox:
        id_, crowd = annotation["category_id"], annotation["iscrowd"]
        x, y, width, height = map(float, annotation["bbox"])
        colour = CROWD if crowd else class_colour(id_)
        return DrawnBox((x, y, width, height), id_, self._names.get(id_, "?"), "crowd" if crowd else "", colour)

    def _stored(self, i: int, boxes: list[DrawnBox]) -> ImageFile:
        sample = self.source.sample(i)
        return _drawn(sample.image, boxes, f"stored, {len(boxes)} boxes", f"Image {sample.image_id} as stored")

    def _trained(self, i: int, epoch: int) -> ImageFile:
        data, view = self._config.data, self._views[epoch][i]
        extras = self.extras if self.extras.scenes or self.extras.colours else None
        keys = ((self._config.seed, epoch, i, 0),)
        request = Request(0, (i,), (view,), data.augment.resample == "fused", 0, 1.0, extras=extras, keys=keys)
        pixels = np.empty(request.shape, np.uint8)
        packed = make_group(request, [self.source], pixels)
        height, width = view.out_size
        centres, sides = packed.boxes_cxcywh[:, :2] * (width, height), packed.boxes_cxcywh[:, 2:] * (width, height)
        corners = np.concatenate([centres - sides / 2, sides], axis=1).tolist()
        ids = [self._by_label[label] for label in packed.labels.tolist()]
        boxes = [
            DrawnBox(box, id_, self._names[id_], "", class_colour(id_)) for box, id_ in zip(corners, ids, strict=True)
        ]
        image = Image.fromarray(np.ascontiguousarray(pixels[0].transpose(1, 2, 0)))
        what = f"epoch {epoch}, {width} x {height}, {len(boxes)} boxes"
        return _drawn(image, boxes, what, f"Image {packed.image_ids[0]} as trained in epoch {epoch}")


def gallery_page(config: Config, choice: Choice) -> Page:
    """The page of `data.train`. Raises ShardError, ConfigError."""
    samples = Samples(config, choice)
    items = samples.items()
    shards = [shard.name for shard in samples.source.index.shards]
    used = {value for item in items for value in item.values[0]}
    names = [category.name for category in samples.source.index.categories]
    classes = [name for name in dict.fromkeys([*names, "?", EMPTY]) if name in used]
    files = [shard for shard in shards if any(shard in item.values[1] for item in items)]
    facts = [
        ("shards", config.data.train),
        ("images", f"{len(items):,} of {len(samples.source):,}"),
        ("augmentation", describe_augmentation(config.data.augment)),
        ("seed", str(config.seed)),
    ]
    parts: list[Part] = [
        Facts(facts),
        Text(
            "Each row is an image as it is stored, then as training sees it in the first epochs. A click enlarges an "
            "image, the arrow keys show the next one; j and k go to the next and the previous row."
        ),
        Gallery("Images with their boxes", [("class", classes), ("file", files)], items),
    ]
    return Page(f"Samples of {config.data.train}", parts)


def _drawn(image: Image.Image, boxes: list[DrawnBox], caption: str, description: str) -> ImageFile:
    drawn = draw_boxes(image, boxes, LONGEST)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=QUALITY)
    names = Counter(box.name for box in boxes)
    shown = ", ".join(f"{count} {name}" for name, count in sorted(names.items())) or EMPTY
    return ImageFile(buffer.getvalue(), drawn.size, caption, f"{description}: {shown}")

"""Drawn data sets of `benchmarks.own_data`: a plain one for start weights, one with rare classes, one of few images.

The last two are another domain than the first: grey, inverted, blurred and with less contrast, as from another camera.
The few images also have other classes: three of the five shapes, and the other two are unlabelled clutter. Pure
functions of their numbers.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic

SIDE = 96  # pixels, the mean side of an image
RARE = ("ring", "cross")
RARE_IMAGES = 6  # of the training images that contain each rare class
Tree = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """How many images are drawn, how many are used, and what is done to them."""

    title: str
    train: int
    val: int
    classes: tuple[str, ...]
    other_domain: bool
    rare: tuple[str, ...] = ()
    seed: int = 0  # that splits add 0 and 1 to

    def draw(self, folder: Path) -> dict[str, str]:
        """Draw and shard both splits where they are missing; returns the digest of each."""
        return {split: self._draw_split(folder, number, split) for number, split in enumerate(("train", "val"))}

    def _draw_split(self, folder: Path, number: int, split: str) -> str:
        shards, raw = folder / split, folder / "raw" / split
        if not (shards / "index.json").exists():
            rare = self.rare if split == "train" else ()
            wanted = getattr(self, split)
            shutil.rmtree(raw, ignore_errors=True)
            path, images = write_synthetic(raw, images=wanted * (8 if rare else 1), seed=self.seed + number, size=SIDE)
            tree = json.loads(path.read_text(encoding="utf-8"))
            tree = keep_classes(make_rare(tree, rare, wanted), self.classes)
            path.write_text(json.dumps(tree), encoding="utf-8")
            for entry in tree["images"] if self.other_domain else ():
                change_file(images / entry["file_name"], to_other_domain)
            build_shards(path, images, shards, workers=1)
        return load_index(str(shards)).digest


PLAIN = DataSet("plain", 600, 200, tuple(CATEGORIES.values()), other_domain=False)
SETS: Mapping[str, DataSet] = {
    "rare": DataSet("rare classes", 300, 200, tuple(CATEGORIES.values()), other_domain=True, rare=RARE, seed=10),
    "few": DataSet("few images", 48, 200, ("disc", "square", "ring"), other_domain=True, seed=20),
}


def make_rare(tree: Tree, rare: tuple[str, ...], images: int) -> Tree:
    """The first `images` images of which only RARE_IMAGES contain each rare class; all of them without a rare class."""
    names = {category["id"]: category["name"] for category in tree["categories"]}
    found: dict[int, set[str]] = {image["id"]: set() for image in tree["images"]}
    for annotation in tree["annotations"]:
        found[annotation["image_id"]].add(names[annotation["category_id"]])
    seen = dict.fromkeys(rare, 0)
    kept: set[int] = set()
    for image, classes in found.items():
        hit = [name for name in rare if name in classes]
        if len(kept) < images and len(hit) <= 1 and all(seen[name] < RARE_IMAGES for name in hit):
            kept.add(image)
            for name in hit:
                seen[name] += 1
    return {
        **tree,
        "images": [image for image in tree["images"] if image["id"] in kept],
        "annotations": [each for each in tree["annotations"] if each["image_id"] in kept],
    }


def keep_classes(tree: Tree, classes: tuple[str, ...]) -> Tree:
    """The annotations of some classes, with these as the categories."""
    categories = [category for category in tree["categories"] if category["name"] in classes]
    ids = {category["id"] for category in categories}
    kept = [annotation for annotation in tree["annotations"] if annotation["category_id"] in ids]
    return {**tree, "categories": categories, "annotations": kept}


def to_other_domain(image: Image.Image) -> Image.Image:
    """Grey, inverted, blurred, with three fifths of the contrast."""
    grey = ImageOps.invert(image.convert("L")).filter(ImageFilter.GaussianBlur(0.7))
    return grey.point([round(0.6 * level + 51) for level in range(256)]).convert("RGB")


def change_file(path: Path, change: Callable[[Image.Image], Image.Image]) -> None:
    """Replace a JPEG by its changed image."""
    with Image.open(path) as image:
        changed = change(image)
    changed.save(path, quality=90)

"""Small COCO-format data sets and shard folders for tests; everything is generated."""

import contextlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.index import ShardIndex
from pipeline.data.sharding import shards
from pipeline.data.sharding.shards import build_shards

CATEGORIES = [{"id": 90, "name": "kite"}, {"id": 1, "name": "person"}, {"id": 13, "name": "sign"}]
SIZES = ((48, 64), (64, 48), (50, 50), (40, 80), (33, 57), (64, 64), (31, 90))  # (height, width)
RLE = {"counts": [10, 20, 30], "size": [48, 64]}


def noise_image(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth noise, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def with_orientation(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    """A file of the image as stored, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif)
    return buffer.getvalue()


def write_coco(out: Path, images: int = 12, sizes: Sequence[tuple[int, int]] = SIZES) -> tuple[Path, Path]:
    """`images` images with ids 3, 10, 17 ...: the second is grayscale, the third a PNG, the fourth has no boxes.

    Each has two boxes (one leaves the image), one box without area, and a crowd region.
    """
    folder = out / "images"
    folder.mkdir(parents=True)
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number in range(images):
        image_id, (height, width) = 3 + 7 * number, sizes[number % len(sizes)]
        name = f"some_{image_id}.{'png' if number == 2 else 'jpg'}"
        image = noise_image((height, width), image_id)
        (image.convert("L") if number == 1 else image).save(folder / name)
        tree["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for box, category, crowd in (
            ([4, 6, 12.5, 10], 13, 0),
            ([width - 9, -3, 20, 15], 90, 0),
            ([5, 5, 0, 7], 1, 0),
            ([1, 2, 20, 20], 1, 1),
        ):
            entry = {"id": len(tree["annotations"]) + 1, "image_id": image_id, "category_id": category, "bbox": box}
            entry |= {"area": box[2] * box[3] / 2, "iscrowd": crowd, "segmentation": RLE if crowd else [[1, 2, 3, 4]]}
            if number != 3:
                tree["annotations"].append(entry)
    path = out / "instances.json"
    path.write_text(json.dumps(tree))
    return path, folder


def write_shards(out: Path, images: int = 12, samples_per_shard: int = 5) -> ShardIndex:
    """A shard folder `out/shards` of `write_coco`."""
    annotations, folder = write_coco(out, images)
    return build_shards(annotations, folder, out / "shards", samples_per_shard=samples_per_shard)


@contextlib.contextmanager
def stopped_at_the_index() -> Iterator[None]:
    """Builds within it meet a Ctrl-C when all shards are finished and the index is not."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "encode_index", stop)
        yield


def edit(path: Path, change: dict[str, Any]) -> None:
    """Replace top-level keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pack(folder: Path, archive: Path, below: str = "", kind: int = zipfile.ZIP_STORED) -> Path:
    """A zip or tar (by suffix) of a folder's files, each under `below`; written in another order than their names."""
    paths = sorted(folder.iterdir(), key=lambda path: path.name[::-1])
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", kind) as packed:
            for path in paths:
                packed.write(path, below + path.name)
    else:
        with tarfile.open(archive, "w") as tar:
            for path in paths:
                tar.add(path, below + path.name)
    return archive

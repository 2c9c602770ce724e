"""The data of the demo: drawn shapes, 1,000 images for training and 200 for validation, as shards."""

from pathlib import Path

from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic

IMAGES = {"train": 1000, "val": 200}


def make_demo_data(train: str, val: str) -> None:
    """Draw and shard both splits into these folders, unless the shards exist. The images lie beside them, in `raw`."""
    for seed, (split, folder) in enumerate({"train": train, "val": val}.items()):
        shards = Path(folder)
        if not (shards / "index.json").exists():
            annotations, images = write_synthetic(shards.parent / "raw" / split, images=IMAGES[split], seed=seed)
            build_shards(annotations, images, shards, workers=1)

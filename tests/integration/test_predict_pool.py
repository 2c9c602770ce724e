"""`jobs.predict` over real images on two actors: identical detections from folders, a zip and shards."""

import json
import zipfile
from pathlib import Path

import pytest
from support.helpers import tiny_checkpoint
from support.paths import SHARED

from jobs import cli, predict
from pipeline.data.sharding.shards import build_shards

SAMPLE = SHARED / "coco_sample"
SPLITS = ("train2017", "val2017")
IMAGES = 128 + 80

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_two_cpus"),
    pytest.mark.skipif(not SAMPLE.is_dir(), reason=f"{SAMPLE} is missing: the real COCO images are not in the project"),
]


def test_predict_folder_zip_and_shards_on_actors_and_here_are_identical(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for split in SPLITS:
            build_shards(SAMPLE / "annotations" / f"instances_{split}.json", SAMPLE / split, tmp_path / split)
            for path in sorted((SAMPLE / split).iterdir()):
                archive.write(path, f"{split}/{path.name}")
    sources = {
        "here": [*(str(SAMPLE / split) for split in SPLITS), "scaling.num_workers=0"],
        "folders": [*(str(SAMPLE / split) for split in SPLITS), "scaling.num_workers=2"],
        "zip": [str(tmp_path / "images.zip"), "scaling.num_workers=2"],
        "shards": [*(str(tmp_path / split) for split in SPLITS), "scaling.num_workers=2"],
    }
    found = {}
    for name, words in sources.items():
        out = tmp_path / f"{name}.json"
        words = [str(checkpoint), *words, "--out", str(out), "--threshold", "0", "scaling.use_gpu=false"]
        assert cli.main(predict.build_parser(), predict.run, words) == 0
        listed = json.loads((tmp_path / f"{name}.images.json").read_text())
        assert len({image["id"] for image in listed["images"]}) == len(listed["images"]) == IMAGES
        keys = ("image_id", "category_id", "bbox", "score")
        rows = [[row[key] for key in keys] for row in json.loads(out.read_text())]
        found[name] = sorted(rows, key=lambda row: row[0])  # stable: the order within an image is compared
    assert len({row[0] for row in found["here"]}) == IMAGES
    for name, rows in found.items():
        assert rows == found["here"], name

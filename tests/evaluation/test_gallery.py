"""The gallery's trained images are those of the loader, and every stored box is drawn, crowd regions marked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.data import write_shards

from pipeline.config import AugmentConfig, Config, DataConfig, TrainConfig
from pipeline.data.loader import TrainLoader
from pipeline.evaluation import gallery
from pipeline.evaluation.drawing import DrawnBox
from pipeline.evaluation.gallery import Choice, Samples, gallery_page
from pipeline.pages.parts import Gallery

SMALL: dict[str, Any] = {"scales": (48, 56), "max_size": 90, "crop_scales": (44, 60), "crop_range": (30, 50)}


@pytest.mark.parametrize("resample", ["reference", "fused"])
def test_trained_images_are_those_of_the_loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resample: Any) -> None:
    augment = AugmentConfig(preset="strong", quarter_turns=0.5, resample=resample, **SMALL)
    data = DataConfig(train=write_shards(tmp_path, images=6).folder, workers=0, augment=augment)
    drawn: dict[str, tuple[Image.Image, list[DrawnBox]]] = {}

    def note(image: Image.Image, boxes: list[DrawnBox], caption: str, description: str) -> None:
        drawn[description] = image, boxes

    monkeypatch.setattr(gallery, "_drawn", note)
    Samples(Config(data=data, seed=5), Choice()).items()
    assert len(drawn) == 18
    loader = TrainLoader(data, TrainConfig(global_batch=1, micro_batch=1), 5, 0, 1)
    for epoch in (0, 1):
        for (batch,) in loader.epoch(epoch):
            image, boxes = drawn[f"Image {batch.image_ids.item()} as trained in epoch {epoch}"]
            np.testing.assert_array_equal(np.asarray(image), batch.images[0].permute(1, 2, 0).numpy())
            sides = np.array([image.width, image.height] * 2)
            centred = [[b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]] for b in (box.box_xywh for box in boxes)]
            expected = batch.boxes_cxcywh.numpy() * sides
            np.testing.assert_allclose(np.array(centred).reshape(-1, 4), expected, atol=1e-3)
            ids = loader.index.category_ids
            assert [box.category_id for box in boxes] == [ids[label] for label in batch.labels.tolist()]


def test_stored_images_have_every_annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(train=write_shards(tmp_path, images=2).folder)
    drawn: list[list[DrawnBox]] = []
    monkeypatch.setattr(gallery, "_drawn", lambda image, boxes, *texts: drawn.append(boxes))
    Samples(Config(data=data), Choice(epochs=0)).items()
    assert [[(box.name, box.note) for box in boxes] for boxes in drawn] == [
        [("sign", ""), ("kite", ""), ("person", ""), ("person", "crowd")]
    ] * 2


def test_gallery_page_filters_name_what_the_items_have(tmp_path: Path) -> None:
    index = write_shards(tmp_path, images=6, samples_per_shard=4)
    page = gallery_page(Config(data=DataConfig(train=index.folder)), Choice(images=4, epochs=0))
    (shown,) = [part for part in page.parts if isinstance(part, Gallery)]
    assert dict(shown.filters) == {
        "class": ["person", "sign", "kite", "no boxes"],
        "file": [shard.name for shard in index.shards],
    }
    assert len(shown.items) == 4
    for item in shown.items:
        assert all(set(own) <= set(known) for own, (_, known) in zip(item.values, shown.filters, strict=True))

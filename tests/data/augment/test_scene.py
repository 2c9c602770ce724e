"""Scenes through the loader: the same bits anywhere, boxes where the pixels are, and evaluation untouched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data import write_shards
from support.drawn_boxes import draw_rectangles, seen_boxes

from pipeline.config import AugmentConfig, DataConfig, TrainConfig
from pipeline.config.augment import PRESETS, Extras
from pipeline.data.augment.draws import Draws
from pipeline.data.augment.scene import make_scene, neighbour
from pipeline.data.batch import Batch
from pipeline.data.index import ShardIndex
from pipeline.data.loader import EvalLoader, TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.transforms import draw_views

SMALL: dict[str, Any] = {"scales": (48, 56), "max_size": 90, "crop_scales": (44, 60), "crop_range": (30, 50)}
EVERYTHING = AugmentConfig(
    preset="strong", quarter_turns=0.5, vertical_flip=0.5, mosaic=0.5, copy_paste=0.5, affine=0.5, eval_size=48, **SMALL
)
TRAIN = TrainConfig(global_batch=4, micro_batch=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("scenes"), images=12, samples_per_shard=5)


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Twelve images of 96 x 128 with one rectangle each, whose colour is its class."""
    out = tmp_path_factory.mktemp("rectangles")
    (out / "images").mkdir()
    tree: dict[str, Any] = {"images": [], "annotations": []}
    tree["categories"] = [{"id": k + 1, "name": f"c{k}"} for k in range(6)]
    for number in range(12):
        label = number % 6
        box = (20 + 3 * number, 20 + number, 60 + 3 * number, 55 + 2 * number)
        draw_rectangles((96, 128), [box], [label]).image.save(out / "images" / f"{number + 1}.png")
        tree["images"].append({"id": number + 1, "file_name": f"{number + 1}.png", "width": 128, "height": 96})
        x0, y0, x1, y1 = box
        entry = {"id": number + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": 0}
        tree["annotations"].append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    (out / "a.json").write_text(json.dumps(tree))
    return build_shards(out / "a.json", out / "images", out / "shards")


def config(index: ShardIndex, augment: AugmentConfig, workers: int = 0) -> DataConfig:
    return DataConfig(train=index.folder, val=index.folder, workers=workers, window=12, augment=augment)


def groups(steps: list[list[Batch]]) -> dict[tuple[int, int], tuple[bytes, bytes, list[int]]]:
    return {
        (t, batch.group): (
            batch.images.numpy().tobytes(),
            batch.boxes_cxcywh.numpy().tobytes(),
            batch.labels.tolist(),
        )
        for t, step in enumerate(steps)
        for batch in step
        if batch.weight
    }


@pytest.mark.parametrize("resample", ["reference", "fused"])
def test_loader_everything_on_has_the_same_bits_in_any_world_and_process(index: ShardIndex, resample: str) -> None:
    augment = EVERYTHING.model_copy(update={"resample": resample})
    whole = groups(list(TrainLoader(config(index, augment), TRAIN, 2**63, 0, 1).epoch(1)))
    assert whole != groups(list(TrainLoader(config(index, augment), TRAIN, 2**63, 0, 1).epoch(2)))
    shared: dict[tuple[int, int], Any] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for rank in (0, 1):
            data = config(index, augment, workers=rank)
            shared |= groups(list(TrainLoader(data, TRAIN, 2**63, rank, 2).epoch(1)))
    finally:
        torch.set_num_threads(threads)
    assert shared == whole
    late = groups(list(TrainLoader(config(index, augment), TRAIN, 2**63, 0, 1).epoch(1, start_step=2)))
    assert late == {(t - 2, group): row for (t, group), row in whole.items() if t >= 2}


def test_loader_sizes_are_those_of_the_plan(index: ShardIndex) -> None:
    augment = EVERYTHING.model_copy(update={"quarter_turns": 1.0})
    views = draw_views(index.sizes(), 3, 0, augment)
    ids = index.samples.image_id.tolist()
    for (batch,) in TrainLoader(config(index, augment), TrainConfig(global_batch=1, micro_batch=1), 3, 0, 1).epoch(0):
        i = ids.index(batch.image_ids.item())
        assert list(batch.images.shape[2:]) == views.out_size[i].tolist()
        assert batch.sizes[0].tolist() == index.sizes()[i].tolist()


SETTINGS: dict[str, dict[str, Any]] = {
    "vertical_flip": {"vertical_flip": 1.0},
    "quarter_turns": {"quarter_turns": 1.0},
    "affine": {"affine": 1.0, "rotate": 0.0, "shear": 0.0, "zoom": (0.7, 1.4), "translate": 0.2},
    "mosaic": {"mosaic": 1.0},
    "colours": {"brightness": 0.2, "contrast": 0.2, "noise": 1.0, "noise_level": 6.0},
    "published": {"crop": 0.5},
}


@pytest.mark.parametrize("resample", ["reference", "fused"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loader_boxes_follow_the_pixels(rectangles: ShardIndex, name: str, resample: str) -> None:
    """Through the whole way of a sample, at twice its size: box from pixels and box from annotation to 3 pixels."""
    chosen = {"scales": (192,), "max_size": 400, "crop": 0.0, "resample": resample, **SETTINGS[name]}
    augment = AugmentConfig(crop_scales=(150,), crop_range=(90, 130), min_visible=0.0, **chosen)
    checked = 0
    for epoch in range(2):
        loader = TrainLoader(config(rectangles, augment), TrainConfig(global_batch=1, micro_batch=1), 0, 0, 1)
        for (batch,) in loader.epoch(epoch):
            height, width = batch.images.shape[2:]
            shown = Image.fromarray(batch.images[0].permute(1, 2, 0).numpy())
            seen = seen_boxes(shown)
            labels = batch.labels.tolist()
            cx, cy, w, h = (batch.boxes_cxcywh * torch.tensor([width, height] * 2)).T.numpy()
            for label, box in zip(labels, np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1), strict=True):
                if labels.count(label) == 1 and min(box[2:] - box[:2]) > 6:
                    np.testing.assert_allclose(box, seen[label], atol=3, err_msg=f"{name}, label {label}")
                    checked += 1
    assert checked >= 12


def test_make_scene_without_extras_is_the_sample(index: ShardIndex) -> None:
    source = TrainLoader(config(index, AugmentConfig()), TRAIN, 0, 0, 1).data
    for i in range(3):
        sample, scene = source.sample(i), make_scene(source, i, Extras(), (0, 0, i, 0))
        assert scene.image == sample.image
        np.testing.assert_array_equal(scene.boxes_xyxy, sample.boxes_xyxy)


def test_neighbour_is_any_sample_of_the_same_shard(index: ShardIndex) -> None:
    source = TrainLoader(config(index, AugmentConfig()), TRAIN, 0, 0, 1).data
    shards = index.samples.shard
    draws = Draws(0, 1)
    for i in range(len(index)):
        found = {neighbour(source, i, draws) for _ in range(60)}
        assert found == set(np.flatnonzero(shards == shards[i]).tolist())


@pytest.mark.parametrize("preset", PRESETS)
def test_evaluation_does_not_depend_on_the_augmentation(index: ShardIndex, preset: str) -> None:
    plain = list(EvalLoader(config(index, AugmentConfig(eval_size=48, max_size=90)), 2, 0, 1))
    augment = AugmentConfig(preset=preset, eval_size=48, max_size=90, mosaic=1.0, quarter_turns=1.0, noise=1.0)
    for one, other in zip(plain, EvalLoader(config(index, augment), 2, 0, 1), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.boxes_cxcywh, other.boxes_cxcywh)


def test_loader_preset_none_trains_on_the_views_of_the_evaluation(index: ShardIndex) -> None:
    augment = AugmentConfig(preset="none", eval_size=48, max_size=90)
    train = TrainConfig(global_batch=1, micro_batch=1)
    shown = {b.image_ids.item(): b.images for (b,) in TrainLoader(config(index, augment), train, 0, 0, 1).epoch(5)}
    expected = {b.image_ids.item(): b.images for b in EvalLoader(config(index, augment), 1, 0, 1)}
    assert shown.keys() == expected.keys()
    assert all(torch.equal(shown[i], expected[i]) for i in shown)


def test_loader_published_preset_reads_no_random_number_of_the_extras(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's presets take the old way: their pixels, plan and golden curves cannot move."""
    monkeypatch.setattr("pipeline.data.group.make_scene", None)
    monkeypatch.setattr("pipeline.data.group.colour_item", None)
    monkeypatch.setattr("pipeline.data.transforms._draw_turns", lambda count, key, extras: _no_turns(count, extras))
    loader = TrainLoader(config(index, AugmentConfig(**SMALL)), TRAIN, 42, 0, 1)
    assert len(list(loader.epoch(0))) == 3


def _no_turns(count: int, extras: Extras) -> tuple[np.ndarray, np.ndarray]:
    assert not extras.turns
    return np.zeros(count, np.int64), np.zeros(count, np.bool_)

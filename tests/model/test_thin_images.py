"""Images thinner than the deepest stride: training, evaluation and prediction pad them alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.helpers import tiny_config
from support.model import small_detr

from pipeline.checkpoint import Inference, TrainState
from pipeline.config import Config, OptimConfig, dump
from pipeline.data.loader import TrainLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.engine.backend import PlainBackend
from pipeline.engine.module import LossModule
from pipeline.engine.step import Engine
from pipeline.evaluation.evaluator import build_evaluator
from pipeline.inference.predictor import Predictor
from pipeline.model import build_criterion, build_model
from pipeline.runtime import single

SIZES = ((700, 96), (96, 700), (500, 20), (20, 500), (300, 1), (640, 90))  # (width, height)
DETR = {"model": small_detr().model_dump(mode="json"), "loss": {"classification": "softmax"}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise with one box each, and their shards: no pad group holds a side of the stride."""
    folder, generator = tmp_path_factory.mktemp("thin"), np.random.default_rng(3)
    (folder / "images").mkdir()
    images, boxes = [], []
    for number, (width, height) in enumerate(SIZES):
        noise = generator.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
        box = [width / 4, 0, width / 2, height]
        boxes.append({"id": number + 1, "image_id": number, "category_id": 1 + number % 5, "bbox": box, "iscrowd": 0})
        boxes[-1]["area"] = box[2] * box[3]
    categories = [{"id": k, "name": f"kind {k}"} for k in range(1, 6)]
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    build_shards(annotations, folder / "images", folder / "shards")
    return folder


def config_of(folder: Path, name: str, micro_batch: int) -> Config:
    shards = str(folder / "shards")
    augment = {"scales": [96], "eval_size": 96, "max_size": 128, "crop_scales": [96], "crop_range": [16, 96]}
    data = {"train": shards, "val": shards, "workers": 0, "augment": augment}
    train = {"global_batch": 6, "micro_batch": micro_batch}
    return tiny_config(**{"data": data, "train": train, **(DETR if name == "detr" else {})})


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.parametrize("name", ["deformable_detr", "detr"])
def test_training_group_of_thin_images_works(drawn: Path, name: str, micro_batch: int) -> None:
    config = config_of(drawn, name, micro_batch)
    torch.manual_seed(0)
    module = LossModule(build_model(config.model), build_criterion(config.loss))
    engine = Engine(module, PlainBackend(module, OptimConfig(), torch.device("cpu")), single(), seed=0)
    loader = TrainLoader(config.data, config.train, 0, 0, 1)
    smallest = 1000
    for step, batches in enumerate(loader.epoch(0)):
        smallest = min(smallest, *(side for batch in batches for side in batch.images.shape[2:]))
        assert np.isfinite(engine.train_step(batches, step).losses["loss"])
    assert smallest < module.model.stride


@pytest.mark.parametrize("name", ["deformable_detr", "detr"])
def test_prediction_thin_images_equals_evaluation(drawn: Path, name: str) -> None:
    config = config_of(drawn, name, 1)
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    evaluator = build_evaluator(config.data, config.evaluation, single())
    result = evaluator.run(model)
    assert result is not None
    categories = evaluator.loader.index.categories
    state = TrainState(dump(config), categories, "digest", 1, 0, 1, 1)
    predictor = Predictor(Inference(config, categories, model, state), "cpu")
    paths = [drawn / "images" / f"{number}.png" for number in range(len(SIZES))]
    for number, found in enumerate(predictor.predict(paths, threshold=0.0)):
        evaluated = result.detections[result.detections.image_ids == number]
        np.testing.assert_allclose(evaluated.scores, found["scores"], rtol=1e-5)
        np.testing.assert_allclose(evaluated.boxes_xywh, found["boxes"], rtol=1e-4, atol=1e-3)

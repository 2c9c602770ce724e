"""benchmarks.miniature.pretraining: the backbone that all rows start from."""

from pathlib import Path

import torch

from benchmarks.miniature.pretraining import Pretraining, _crops, pretrain_backbone
from benchmarks.miniature.training import BASE
from pipeline.config import load_config, override
from pipeline.model.backbones.build import build_backbone

TINY = Pretraining(images=24, side=64, epochs=1)


def test_pretrain_backbone_writes_weights_that_a_detector_loads_and_trains_once(tmp_path: Path) -> None:
    config = override(load_config(BASE), ["model.backbone.width=8"]).model.backbone
    digest = pretrain_backbone(config, TINY, tmp_path)
    path = tmp_path / TINY.file
    written = path.read_bytes()
    assert pretrain_backbone(config, TINY, tmp_path) == digest == TINY.digest
    assert path.read_bytes() == written
    loaded = build_backbone(config.model_copy(update={"weights": str(path)})).state_dict()
    torch.manual_seed(2)
    fresh = build_backbone(config).state_dict()
    assert all(not torch.equal(loaded[name], fresh[name]) for name in fresh)


def test_pretraining_digest_is_of_the_recipe() -> None:
    others = [Pretraining(25, 64, 1), Pretraining(24, 65, 1), Pretraining(24, 64, 2)]
    assert len({TINY.digest, *(each.digest for each in others)}) == 4


def test_crops_show_one_object_of_each_annotation_with_its_class(tmp_path: Path) -> None:
    images, classes = _crops(tmp_path, TINY)
    assert images.shape == (len(classes), 3, 64, 64)
    assert set(classes.tolist()) == {0, 1, 2, 3, 4}
    # The middle is the object, so it differs from the corners more than two corners do from each other.
    middle, corners = images[:, :, 28:36, 28:36].mean((2, 3)), images[:, :, [0, -1]][:, :, :, [0, -1]].flatten(2)
    assert ((middle - corners.mean(2)).abs().mean() > corners.std(2).mean()).item()

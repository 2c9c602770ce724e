"""Hugging Face's models: this project computes the same outputs from their files as transformers.

`assets/hugging_face` holds per variant the keys and shapes of a file as transformers writes it, and what its
`DeformableDetrForObjectDetection` made of the tensors and images of `golden_recipe` (three logits and the box of each
query). The recipe makes every tensor from its key, so none had to be stored.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import golden_recipe
from support.paths import ASSETS
from torch import Tensor

from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError
from pipeline.model import build_model
from pipeline.model.weights.files import WeightFile
from pipeline.model.weights.hugging_face import to_published
from pipeline.model.weights.init_from import load_exactly
from pipeline.model.weights.published import export_official

FOLDER = ASSETS / "hugging_face"
FLAGS = {"ms": {}, "refine": {"refine": True}, "two_stage": {"refine": True, "two_stage": True}}


def file_of(variant: str) -> dict[str, Tensor]:
    return golden_recipe.checkpoint(json.loads((FOLDER / f"{variant}.json").read_text()))


def in_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names that `state_dict()` has in transformers 5, where layers repeat tied heads."""
    names = {
        re.sub(r"(layers\.\d+)\.(fc[12])", r"\1.mlp.\2", key)
        .replace("backbone.conv_encoder.", "backbone.")
        .replace("self_attn.out_proj", "self_attn.o_proj"): tensor
        for key, tensor in tensors.items()
    }
    return with_repeated_heads(names)


def with_repeated_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `state_dict()` gives it, and transformers 4 wrote it to .bin files: heads under each of their names."""
    more = dict(tensors)
    for key, tensor in tensors.items():
        if key.startswith("model.decoder.") and "_embed." in key:
            more[key.removeprefix("model.decoder.")] = tensor
    for part in ("class_embed", "bbox_embed"):
        if f"{part}.1.{'weight' if part[0] == 'c' else 'layers.0.weight'}" not in more:
            first = [key for key in more if key.startswith(f"{part}.0.")]
            more |= {key.replace(".0.", f".{i}.", 1): more[key] for key in first for i in range(1, 6)}
    return more


@pytest.mark.parametrize("variant", FLAGS)
def test_to_published_outputs_equal_transformers(variant: str) -> None:
    config = ModelConfig(num_classes=91, dropout=0.0, backbone={"weights": "none"}, **FLAGS[variant])
    model = build_model(config).eval()
    load_exactly(model, WeightFile("model.safetensors", "hugging_face", file_of(variant)))
    with torch.no_grad():
        outputs = model(*golden_recipe.batch())
    with np.load(FOLDER / f"{variant}.npz") as recorded:
        expected = torch.cat([torch.from_numpy(recorded[key]) for key in ("logits", "boxes")], dim=-1)
    found = torch.cat([outputs["pred_logits"][..., :3], outputs["pred_boxes"]], dim=-1)
    # two-stage ranks its proposals; where two score alike to rounding, the queries change places
    distance = torch.cdist(expected, found, p=float("inf"))
    assert distance.min(2).values.max() < 2e-4
    assert distance.min(1).values.max() < 2e-4
    if variant != "two_stage":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", FLAGS)
def test_to_published_names_of_every_release(variant: str) -> None:
    """Translated, all of them have the published checkpoint's keys and shapes, and the same values."""
    on_disk = file_of(variant)
    meta, _ = golden_recipe.load(variant)
    published = to_published(on_disk)
    assert {key: list(tensor.shape) for key, tensor in published.items()} == meta["keys"]
    for other in (in_memory(on_disk), with_repeated_heads(on_disk)):
        assert len(other) > len(on_disk)
        translated = to_published(other)
        assert translated.keys() == published.keys()
        assert all(torch.equal(translated[key], published[key]) for key in published)


def test_init_from_hub_folder_works(tmp_path: Path) -> None:
    tensors = file_of("two_stage")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    flags = {**FLAGS["two_stage"], "num_classes": 7, "init_from": str(tmp_path)}
    model = build_model(ModelConfig(**flags))  # ImageNet weights are not asked for
    found, expected = export_official(model), to_published(tensors)
    new = {
        key for key in expected if found[key].shape != expected[key].shape or not torch.equal(found[key], expected[key])
    }
    assert new == {key for key in expected if "class_embed" in key}


def test_to_published_joins_projections_in_order() -> None:
    tensors = file_of("ms")
    joined = to_published(tensors)["transformer.decoder.layers.3.self_attn.in_proj_weight"]
    parts = [tensors[f"model.decoder.layers.3.self_attn.{which}_proj.weight"] for which in "qkv"]
    assert torch.equal(joined, torch.cat(parts))


def test_load_exactly_hugging_face_mismatch_is_reported() -> None:
    tensors = file_of("ms")
    del tensors["model.decoder.layers.0.self_attn.k_proj.bias"], tensors["model.level_embed"]
    tensors["model.something.else"] = torch.zeros(1)
    model = build_model(ModelConfig(num_classes=91, backbone={"weights": "none"}))
    before = model.state_dict()["backbone.body.conv1.weight"].clone()
    with pytest.raises(CheckpointError) as caught:
        load_exactly(model, WeightFile("hub/model.safetensors", "hugging_face", tensors))
    report = str(caught.value)
    assert report.startswith("hub/model.safetensors (Hugging Face; here under the published names): ")
    assert "2 keys missing: " in report
    assert "transformer.level_embed" in report
    assert "transformer.decoder.layers.0.self_attn.in_proj_bias" in report
    assert "1 keys extra: transformer.something.else" in report
    assert torch.equal(model.state_dict()["backbone.body.conv1.weight"], before)


def test_to_published_differing_heads_raise() -> None:
    tensors = with_repeated_heads(file_of("refine"))
    tensors["bbox_embed.2.layers.0.bias"] = tensors["bbox_embed.2.layers.0.bias"] + 1
    with pytest.raises(CheckpointError, match=r"bbox_embed\.2\.layers\.0\.bias .*transformer\.decoder"):
        to_published(tensors)


def test_to_published_other_model_raises() -> None:
    tensors = {
        "model.backbone.conv_encoder.model.conv1.weight": torch.zeros(1),
        "class_labels_classifier.bias": torch.zeros(92),
    }
    with pytest.raises(CheckpointError, match="DeformableDetrForObjectDetection"):
        to_published(tensors)

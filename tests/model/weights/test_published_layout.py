"""The published layout: round trip, aliases, and the report of what does not fit."""

import pytest
import torch
from support.model import VARIANTS, small_config, small_detr
from torch import Tensor, nn

from pipeline.errors import CheckpointError
from pipeline.model import DeformableDETR, build_model
from pipeline.model.weights.published import export_official, load_official, load_strict

BACKBONE = {"name": "resnet50", "weights": "none"}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> DeformableDETR:
    torch.manual_seed(0)
    return build_model(small_config(levels=4, backbone=BACKBONE, **VARIANTS[request.param]))


@pytest.fixture(scope="module")
def one_stage() -> DeformableDETR:
    return build_model(small_config(levels=4, backbone=BACKBONE))


def test_published_layout_round_trip(model: DeformableDETR) -> None:
    published = {key: tensor.clone() for key, tensor in export_official(model).items()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_official(model, published)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_official_names_of_shared_and_refining_heads(model: DeformableDETR) -> None:
    names = {key for key in export_official(model) if "_embed." in key and key.endswith("weight")}
    heads = 3 + model.config.two_stage
    assert {f"class_embed.{i}.weight" for i in range(heads)} <= names
    assert (f"transformer.decoder.bbox_embed.{heads - 1}.layers.2.weight" in names) == model.config.refine
    assert ("transformer.decoder.class_embed.0.weight" in names) == model.config.two_stage
    assert ("query_embed.weight" in names) != model.config.two_stage


def test_official_names_detr_differ_by_prefix_only() -> None:
    model = build_model(small_detr(backbone=BACKBONE))
    published = export_official(model)
    assert set(published) == {f"backbone.0.{k[9:]}" if k.startswith("backbone.") else k for k in model.state_dict()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    copy = {key: tensor.clone() for key, tensor in published.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_official(model, copy)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_load_official_ignores_keys_of_profiler(one_stage: DeformableDETR) -> None:
    published = export_official(one_stage)
    strays = {"total_params": torch.zeros(1), "transformer.encoder.total_ops": torch.zeros(1)}
    load_official(one_stage, published | strays)


def test_load_official_error_lists_everything(one_stage: DeformableDETR) -> None:
    published = {key: torch.zeros_like(tensor) for key, tensor in export_official(one_stage).items()}
    del published["query_embed.weight"], published["class_embed.1.bias"]
    published["transformer.bonus"] = torch.zeros(1)
    published["class_embed.0.weight"] = torch.zeros(91, 32)
    with pytest.raises(CheckpointError) as caught:
        load_official(one_stage, published)
    report = str(caught.value)
    assert "2 keys missing: " in report
    assert "query_embed.weight" in report
    assert "class_embed.1.bias" in report
    assert "1 keys extra: transformer.bonus" in report
    assert "class_embed.0.weight [91, 32] instead of [5, 32]" in report
    assert one_stage.query_embed.weight.any()


def test_shorten_list_long_report_is_cut() -> None:
    with pytest.raises(CheckpointError, match=r"\b20 .*key7\b.* 12 "):
        load_strict(nn.ReLU(), {f"key{i}": torch.zeros(1) for i in range(20)}, "test")


def test_load_official_differing_aliases_raise(one_stage: DeformableDETR) -> None:
    published: dict[str, Tensor] = export_official(one_stage)
    published["class_embed.2.weight"] = published["class_embed.2.weight"] + 1
    with pytest.raises(CheckpointError, match=r"class_embed.0.weight and class_embed.2.weight"):
        load_official(one_stage, published)


def test_load_official_other_variant_raises(one_stage: DeformableDETR) -> None:
    refine = build_model(small_config(levels=4, backbone=BACKBONE, refine=True))
    with pytest.raises(CheckpointError, match=r"transformer\.decoder\.bbox_embed"):
        load_official(one_stage, export_official(refine))


@pytest.mark.parametrize("backbone", [{"name": "conv5", "weights": "none"}, {**BACKBONE, "norm": "group"}])
def test_official_names_other_backbone_raises(backbone: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match=r"model\.backbone\.norm=frozen_batch"):
        export_official(build_model(small_config(backbone=backbone)))

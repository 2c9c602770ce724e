"""`model.init_from`: matching tensors are loaded, heads for other data stay new, another variant is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import tiny_checkpoint, tiny_config, tiny_run
from support.model import SMALL, VARIANTS, padded_images, random_targets, small_config, small_detr
from torch import Tensor

from pipeline.checkpoint import TrainState, load_inference, save
from pipeline.config import LossConfig, ModelConfig, dump
from pipeline.errors import CheckpointError
from pipeline.launch.preflight import make_paths_absolute
from pipeline.model import DeformableDETR, build_criterion, build_model
from pipeline.model.weights.files import WeightFile, read_weights
from pipeline.model.weights.init_from import load_exactly
from pipeline.model.weights.published import export_official
from pipeline.runs.record import write_run

RESNET = {"name": "resnet50", "weights": "none"}
CONV5 = {"name": "conv5", "weights": "none", "norm": "group", "width": 8}
LEAVES = ("weight", "bias")
RCNN = [f"{part}.{leaf}" for part in ("cls_score", "bbox_pred") for leaf in LEAVES]
PRIOR = -4.59512  # logit of 0.01


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of five classes and twelve queries."""
    return tiny_checkpoint(tmp_path_factory.mktemp("run"), seed=3)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A published file of each variant, for five classes, heads trained apart where layers have their own."""
    folder = tmp_path_factory.mktemp("published")
    paths = {}
    for name, changes in VARIANTS.items():
        torch.manual_seed(11)
        model = build_model(small_config(backbone=RESNET, **changes))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "_embed" in key:
                    parameter.add_(torch.randn_like(parameter))
        paths[name] = folder / f"{name}.pth"
        torch.save({"model": export_official(model), "total_params": torch.zeros(1)}, paths[name])
    return paths


def own(path: Path | str) -> dict[str, Tensor]:
    return read_weights(str(path)).tensors


def build(path: Path | str, **changes: Any) -> DeformableDETR:
    return build_model(small_config(init_from=str(path), **changes))


def equal_keys(model: DeformableDETR, tensors: dict[str, Tensor]) -> set[str]:
    return {key for key, tensor in model.state_dict().items() if key in tensors and torch.equal(tensor, tensors[key])}


def test_start_from_same_classes_loads_everything(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.model"):
        model = build(checkpoint)
    weights = own(checkpoint)
    assert equal_keys(model, weights) == set(weights) == set(model.state_dict())
    (message,) = (record.message for record in caplog.records if "init_from" in record.message)
    assert message == f"model.init_from={checkpoint}: {len(weights)} of {len(weights)} tensors loaded"


def test_start_from_other_classes_makes_new_head(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.model"):
        model = build(checkpoint, num_classes=3)
    head = {"class_embed.0.weight", "class_embed.0.bias"}
    assert set(model.state_dict()) - equal_keys(model, own(checkpoint)) == head
    assert model.class_embed[0].bias.tolist() == pytest.approx([PRIOR] * 3, abs=1e-4)
    assert "new: class_embed.0.weight ([5, 32] in the file, [3, 32] here), class_embed.0.bias" in caplog.text


def test_start_from_other_number_of_queries_makes_new_queries(checkpoint: Path) -> None:
    model = build(checkpoint, queries=20)
    assert set(model.state_dict()) - equal_keys(model, own(checkpoint)) == {"query_embed.weight"}
    assert len(model.query_embed.weight) == 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_start_from_published_file(variant: str, published: dict[str, Path]) -> None:
    given = own(published[variant])
    model = build(published[variant], backbone=RESNET, **VARIANTS[variant])
    exported = export_official(model)
    assert exported.keys() == given.keys()
    assert all(torch.equal(exported[key], given[key]) for key in given)
    other = export_official(build(published[variant], backbone=RESNET, num_classes=2, **VARIANTS[variant]))
    new = {key for key in given if not (other[key].shape == given[key].shape and torch.equal(other[key], given[key]))}
    assert new == {key for key in given if "class_embed" in key}
    assert all((other[key] - PRIOR).abs().max() < 1e-4 for key in new if key.endswith("bias"))


@pytest.mark.parametrize(
    ("config", "new"),
    [
        (small_detr(), {"class_embed.weight", "class_embed.bias"}),
        (ModelConfig(name="faster_rcnn", backbone=CONV5), {f"roi_heads.box_predictor.{k}" for k in RCNN}),
        (ModelConfig(name="fcos", backbone=CONV5), {"head.classification_head.cls_logits." + k for k in LEAVES}),
    ],
    ids=lambda value: value.name if isinstance(value, ModelConfig) else "",
)
def test_start_from_every_detector(tmp_path: Path, config: ModelConfig, new: set[str]) -> None:
    """Tensors that depend on the classes are found by building the model for another number, not by names."""
    weights = build_model(config).state_dict()
    save(tmp_path, TrainState({}, (), "", 0, 0, 0, 0), weights, {})
    model = build_model(config.model_copy(update={"init_from": str(tmp_path), "num_classes": 3}))
    assert set(model.state_dict()) - equal_keys(model, weights) == new


def test_start_from_missing_heads_stay_new(published: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """One shared head becomes the first layer's; the others correct its boxes, which they must learn from nothing."""
    given = own(published["one_stage"])
    with caplog.at_level(logging.INFO, "pipeline.model"):
        model = build(published["one_stage"], backbone=RESNET, refine=True)
    state = model.state_dict()
    assert torch.equal(state["bbox_embed.0.layers.2.bias"], given["bbox_embed.0.layers.2.bias"])
    assert not state["bbox_embed.1.layers.2.weight"].any()
    assert "new: class_embed.1.weight, " in caplog.text
    with caplog.at_level(logging.INFO, "pipeline.model"):
        model = build(published["refine"], backbone=RESNET)
    assert "left out: bbox_embed.1.layers.0.bias, " in caplog.text
    assert torch.equal(
        model.state_dict()["bbox_embed.0.layers.2.bias"], own(published["refine"])["bbox_embed.0.layers.2.bias"]
    )


@pytest.mark.parametrize(
    ("changes", "report"),
    [
        ({"refine": True, "two_stage": True}, r"\b8 .*transformer\.enc_output\.weight"),
        ({"levels": 2}, r"input_proj\.2.*\n.*transformer\.level_embed \[3, 32\]"),
        ({"enc_layers": 3}, r"transformer\.encoder\.layers\.2"),
        ({"enc_points": 3}, r"transformer\.encoder\.layers\.0\.self_attn\.sampling_offsets"),
        ({"hidden_dim": 64}, r"\[64\b|, 64\b"),
        ({"backbone": {**RESNET, "norm": "group"}}, "backbone"),
    ],
)  # fmt: skip
def test_start_from_other_variant_raises(checkpoint: Path, changes: dict[str, Any], report: str) -> None:
    with pytest.raises(CheckpointError, match=report) as caught:
        build(checkpoint, **changes)
    assert str(caught.value).startswith(f"model.init_from: {checkpoint}: ")


def test_start_from_weights_that_are_not_finite_raises(published: dict[str, Path], tmp_path: Path) -> None:
    """A training that starts from them would end at its first loss, after shards, Ray and workers are ready."""
    document = torch.load(published["one_stage"], weights_only=True)
    key = next(key for key in document["model"] if key.endswith("sampling_offsets.weight"))
    document["model"][key][0, 0] = torch.nan
    torch.save(document, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"model\.init_from: .*nan\.pth has .* not finite in .*offsets"):
        build(tmp_path / "nan.pth", backbone=RESNET)


def test_start_from_a_run_of_another_model_names_its_settings_and_what_to_do(tmp_path: Path) -> None:
    write_run(tiny_run(tmp_path))
    with pytest.raises(CheckpointError, match=r"(?s)model\.hidden_dim=\d+.*model\.backbone\.width=8.*give the preset"):
        build(tmp_path, hidden_dim=64)


def test_start_from_error_names_settings_of_file(published: dict[str, Path]) -> None:
    file = WeightFile("x.pth", "published", own(published["two_stage"]), {"two_stage": True, "with_box_refine": True})
    with pytest.raises(CheckpointError, match=r"x\.pth: published.*(\n.*)*two_stage=True, with_box_refine"):
        load_exactly(build_model(small_config(backbone=RESNET)), file)


def test_init_from_fetches_no_imagenet_weights(published: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights bring the backbone")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", download)
    model = build(published["one_stage"], backbone={"name": "resnet50", "weights": "imagenet"})
    assert torch.equal(
        model.state_dict()["backbone.body.conv1.weight"], own(published["one_stage"])["backbone.0.body.conv1.weight"]
    )


def test_init_from_checkpoint_does_not_need_file(tmp_path: Path, checkpoint: Path) -> None:
    config = tiny_config(model={**tiny_config().model.model_dump(), "init_from": str(checkpoint)})
    start = build_model(config.model)
    assert equal_keys(start, own(checkpoint)) == set(own(checkpoint))  # what a run would start from
    later = tiny_checkpoint(tmp_path, config=config)
    gone = config.model.model_copy(update={"init_from": str(tmp_path / "gone")})
    assert build_model(gone, load_backbone=False) is not None  # as --dry-run and a resumed worker do
    with pytest.raises(CheckpointError, match=str(tmp_path / "gone")):
        build_model(gone)
    images = padded_images((64, 96))
    with torch.no_grad():
        expected = build_model(ModelConfig(**{**gone.model_dump(), "init_from": str(later)})).eval()(*images)
        found = load_inference(later).model(*images)
    assert torch.equal(found["pred_logits"], expected["pred_logits"])


def test_init_from_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in [("", ""), ("runs/a", f"{tmp_path}/runs/a"), ("s3://bucket/a.pth", "s3://bucket/a.pth")]:
        config = make_paths_absolute(tiny_config(model={**SMALL, "init_from": given}))
        assert config.model.init_from == expected


def test_init_from_ranks_have_same_weights(checkpoint: Path) -> None:
    """New heads follow the seed, and so does what is drawn afterwards: ranks build for themselves and must agree."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append((build(checkpoint, num_classes=7).state_dict(), torch.rand(1)))
    (first, after), (second, after_second) = drawn
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(after, after_second)


def test_init_from_first_loss_equals_file(tmp_path: Path) -> None:
    config, criterion = tiny_config(), build_criterion(LossConfig())
    images, mask = padded_images((64, 96), (96, 64))
    targets = random_targets(2, 3)

    def loss(model: DeformableDETR) -> Tensor:
        return criterion.total(criterion(model(images, mask), targets, torch.tensor(5.0)))

    torch.manual_seed(1)
    model = build_model(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = loss(model).item()
    for _ in range(8):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    save(tmp_path, TrainState(dump(config), (), "", 1, 0, 8, 8), model.state_dict(), {})
    started = build_model(config.model.model_copy(update={"init_from": str(tmp_path)}))
    assert loss(started).item() == loss(model).item() < 0.9 * first
    assert all(parameter.requires_grad for parameter in started.parameters())

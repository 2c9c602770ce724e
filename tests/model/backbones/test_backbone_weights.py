"""A backbone's initial weights: torchvision's names, files, and their faults."""

import logging
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config import BackboneConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbones.build import build_backbone
from pipeline.model.backbones.weights import load_backbone_weights

OFFSETS = "layer3.1.conv2.conv_offset"


def section(**values: Any) -> BackboneConfig:
    return BackboneConfig(**{"name": "resnet50", **values})


@pytest.fixture(scope="module")
def imagenet_like() -> dict[str, Tensor]:
    """A state_dict as torchvision publishes it: classifier and batch counters included."""
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).state_dict()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of downloads, and no network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_load_backbone_weights_local_file(tmp_path: Path, imagenet_like: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / f"resnet50{suffix}"
    save_file(imagenet_like, path) if suffix == ".safetensors" else torch.save(imagenet_like, path)
    own = build_backbone(section(weights=str(path))).body.state_dict()
    assert own.keys() < imagenet_like.keys()
    assert all(torch.equal(tensor, imagenet_like[key]) for key, tensor in own.items())


def test_load_backbone_weights_file_named_like_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imagenet_like: dict[str, Tensor]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(imagenet_like, "MINE_V3")
    own = build_backbone(section(weights="MINE_V3")).body.state_dict()
    assert torch.equal(own["conv1.weight"], imagenet_like["conv1.weight"])


@pytest.mark.parametrize(
    ("weights", "file"),
    [
        ("imagenet", "resnet50-0676ba61.pth"),
        ("IMAGENET1K_V1", "resnet50-0676ba61.pth"),
        ("IMAGENET1K_V2", "resnet50-11ad3fa6.pth"),
    ],
)
def test_load_backbone_weights_advice_of_message_works(
    hub: Path, imagenet_like: dict[str, Tensor], weights: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without network the error names the file and the folder; with the file in the folder the weights load."""
    with pytest.raises(CheckpointError) as caught:
        build_backbone(section(weights=weights))
    for part in (f"weights={weights}", "no route to host", f"https://download.pytorch.org/models/{file}", str(hub)):
        assert part in str(caught.value)
    torch.save(imagenet_like, hub / file)
    with caplog.at_level(logging.INFO, "pipeline"):
        own = build_backbone(section(weights=weights)).body.state_dict()
    assert all(torch.equal(tensor, imagenet_like[key]) for key, tensor in own.items())
    assert "265 tensors loaded, 0 newly initialised, fc.weight, fc.bias not used" in caplog.text


def test_load_backbone_weights_damaged_download_is_named(hub: Path, imagenet_like: dict[str, Tensor]) -> None:
    path = hub / "resnet50-0676ba61.pth"
    torch.save(imagenet_like, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=rf"resnet50-0676ba61\.pth[\s\S]*{hub}"):
        build_backbone(section(weights="imagenet"))


@pytest.mark.parametrize(
    ("name", "weights", "known"),
    [
        ("resnext101_64x4d", "IMAGENET1K_V2", "IMAGENET1K_V1"),
        ("resnet101", "IMAGENET1K_V3", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("resnext101_32x8d", "imagenet1k_v1", "IMAGENET1K_V1, IMAGENET1K_V2"),
    ],
)
def test_load_backbone_weights_unknown_name_raises(name: str, weights: str, known: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.backbone\.weights={weights}.*{name} .*{known}"):
        load_backbone_weights(nn.Identity(), section(name=name, weights=weights))


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"])
def test_load_backbone_weights_imagenet_is_v1(hub: Path, name: str) -> None:
    url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
    with pytest.raises(CheckpointError, match=url):
        load_backbone_weights(nn.Identity(), section(name=name, weights="imagenet"))


def test_load_backbone_weights_plain_into_deformable(tmp_path: Path, imagenet_like: dict[str, Tensor]) -> None:
    torch.save(imagenet_like, tmp_path / "plain.pth")
    own = build_backbone(section(deformable_conv=True, weights=str(tmp_path / "plain.pth"))).body.state_dict()
    assert torch.equal(own["layer3.1.conv2.weight"], imagenet_like["layer3.1.conv2.weight"])
    assert not own[f"{OFFSETS}.weight"].any()


def test_load_backbone_weights_deformable_are_complete(tmp_path: Path) -> None:
    source = build_backbone(section(deformable_conv=True, weights="none")).body
    nn.init.normal_(source.get_parameter(f"{OFFSETS}.weight"))
    torch.save(source.state_dict(), tmp_path / "deformable.pth")
    own = build_backbone(section(deformable_conv=True, weights=str(tmp_path / "deformable.pth"))).body.state_dict()
    assert torch.equal(own[f"{OFFSETS}.weight"], source.get_parameter(f"{OFFSETS}.weight"))
    with pytest.raises(CheckpointError, match=r"\b26 .*conv_offset"):  # 13 blocks, weight and bias
        build_backbone(section(weights=str(tmp_path / "deformable.pth")))
    partial = {key: tensor for key, tensor in source.state_dict().items() if key != f"{OFFSETS}.bias"}
    torch.save(partial, tmp_path / "partial.pth")
    with pytest.raises(CheckpointError, match=rf"\b1 .*{OFFSETS}\.bias"):
        build_backbone(section(deformable_conv=True, weights=str(tmp_path / "partial.pth")))


def test_load_backbone_weights_other_network_is_reported(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match=r"r18\.pth[\s\S]*layer1\.0\.conv3\.weight[\s\S]*\[64, 64, 3, 3\]"):
        build_backbone(section(weights=str(tmp_path / "r18.pth")))


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


def test_load_backbone_weights_bad_file_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv1.weight": Payload()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    for name in ("code.pth", "list.pth", "text.pth", "cut.safetensors", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_backbone_weights(nn.Identity(), section(weights=str(tmp_path / name)))
    assert "must not run" not in capsys.readouterr().out

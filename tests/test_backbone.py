"""Trunks: shapes, freezing, normalisation, and where their weights come from."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from pipeline.config import BackboneConfig
from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.backbone import Conv5, ResNet, build_backbone
from pipeline.model.norms import FrozenBatchNorm2d


def section(**values: Any) -> BackboneConfig:
    return BackboneConfig(**{"weights": "none", **values})


@pytest.fixture(scope="module")
def imagenet_like() -> dict[str, torch.Tensor]:
    """A state_dict as torchvision publishes it: classifier and batch counters included."""
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).state_dict()


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (section(name="resnet50"), (512, 1024, 2048)),
        (section(name="conv5", norm="group", width=8), (32, 64, 64)),
        (section(name="conv5", norm="frozen_batch", width=12), (48, 96, 96)),
    ],
)
def test_maps_have_the_declared_channels_and_strides(config: BackboneConfig, channels: tuple[int, ...]) -> None:
    backbone = build_backbone(config).eval()
    assert backbone.channels == channels
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 65, 96))
    sizes = [(-(-65 // s), -(-96 // s)) for s in backbone.strides]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *size) for c, size in zip(channels, sizes, strict=True)]


def test_frozen_resnet_trains_layers_2_to_4_only() -> None:
    backbone = build_backbone(section(name="resnet50"))
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    assert all("conv" in name or "downsample.0" in name for name, _ in backbone.named_parameters())
    assert sum(p.numel() for p in backbone.parameters() if not p.requires_grad) == 222_400


def test_resnet101_and_group_norm_train_everything() -> None:
    backbone = ResNet("resnet101", "group")
    assert len(backbone.body.layer3) == 23
    assert all(p.requires_grad for p in backbone.parameters())
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, FrozenBatchNorm2d)) for m in backbone.modules())


def test_conv5_depends_on_no_other_image_of_the_batch() -> None:
    backbone = Conv5(8, "group")
    images = torch.randn(2, 3, 64, 64)
    alone, together = backbone(images[:1]), backbone(images)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_local_file(tmp_path: Path, imagenet_like: dict[str, torch.Tensor], suffix: str) -> None:
    path = tmp_path / f"resnet50{suffix}"
    save_file(imagenet_like, path) if suffix == ".safetensors" else torch.save(imagenet_like, path)
    backbone = build_backbone(section(name="resnet50", weights=str(path)))
    own = backbone.body.state_dict()
    assert own.keys() < imagenet_like.keys()
    assert all(torch.equal(tensor, imagenet_like[key]) for key, tensor in own.items())


def test_file_of_another_network_is_reported(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    with pytest.raises(CheckpointError, match=r"r18.pth[\s\S]*keys missing[\s\S]*of another shape"):
        build_backbone(section(name="resnet50", weights=str(tmp_path / "r18.pth")))


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


def test_bad_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"conv1.weight": Payload()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\x00")
    for name in ("code.pth", "list.pth", "text.pth", "cut.safetensors", "absent.pth"):
        with pytest.raises(CheckpointError, match=name):
            build_backbone(section(name="resnet50", weights=str(tmp_path / name)))
    assert "must not run" not in capsys.readouterr().out


def test_failed_download_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(CheckpointError, match=r"no route to host.*resnet50-0676ba61.pth.*backbone.weights=none"):
        build_backbone(section(name="resnet50", weights="imagenet"))
    build_backbone(section(name="resnet50", weights="imagenet"), load=False)


def test_combinations_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match=r"conv5.*weights=none"):
        build_backbone(section(name="conv5", weights="imagenet"))
    with pytest.raises(ConfigError, match=r"norm=frozen_batch"):
        build_backbone(section(name="resnet50", weights="imagenet", norm="group"))

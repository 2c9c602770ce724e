"""Weights in and out, through the commands: a published file becomes a run that every job takes, and a file again."""

import argparse
import json
import resource
from pathlib import Path

import pytest
import torch
from support.helpers import tiny_checkpoint, tiny_config, write_image
from support.model import SMALL, small_config, small_detr
from torch import Tensor

from jobs import cli, evaluate, export, predict, register, weights
from pipeline.checkpoint import load, load_inference
from pipeline.config import Config, dump_yaml, from_dict
from pipeline.data.coco_categories import COCO_CATEGORIES
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import CATEGORIES, write_synthetic
from pipeline.errors import RunError
from pipeline.launch.driver import train
from pipeline.model import build_model
from pipeline.model.weights.published import export_official
from pipeline.runs.record import IMPORTED, read_run

RESNET = {"name": "resnet50", "weights": "imagenet"}  # not fetched: the file brings the backbone
SMALL_RESNET = {**SMALL, "op": "torch", "backbone": RESNET}


def call(job: object, *argv: object) -> int:
    return cli.main(job.build_parser(), job.run, [str(word) for word in argv])  # type: ignore[attr-defined]


def preset(folder: Path, **model: object) -> Path:
    """A config of contiguous labels and 80 classes, as the presets are."""
    config = from_dict({"model": {**SMALL_RESNET, "num_classes": 80, **model}, "data": {"augment": {"eval_size": 96}}})
    (folder / "preset.yaml").write_text(dump_yaml(config))
    return folder / "preset.yaml"


def published(path: Path, classes: int, **changes: object) -> dict[str, Tensor]:
    """Write what the published code would have saved; returns its tensors."""
    torch.manual_seed(4)
    model = build_model(small_config(num_classes=classes, backbone={**RESNET, "weights": "none"}, **changes))
    tensors = export_official(model)
    torch.save({"model": tensors, "epoch": 49, "args": argparse.Namespace(two_stage=False)}, path)
    return tensors


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_import_published_coco_weights_pass_all_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = published(tmp_path / "coco.pth", 91)
    assert call(weights, "import", "coco.pth", preset(tmp_path), "runs/published", "model.dropout=0.1") == 0
    assert capsys.readouterr().out.startswith(f"run published: {tmp_path}/runs/published (published layout, ")
    record = read_run("published")
    assert record.status == IMPORTED
    config = from_dict(record.config)
    assert (config.model.num_classes, config.data.labels, config.model.dropout) == (91, "raw", 0.1)
    inference = load_inference(record.checkpoint)
    assert inference.categories == COCO_CATEGORIES
    assert load(record.checkpoint).moments == {}

    write_image(tmp_path / "street.jpg")
    assert call(predict, "published", "street.jpg", "--threshold", 0, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"]
    names = {category.id: category.name for category in COCO_CATEGORIES}
    assert [names[category] for category in found["category_ids"]] == found["labels"]
    assert call(predict, record.checkpoint, "street.jpg", "--threshold", 0, "--json") == 0  # the folder itself as well
    assert json.loads(capsys.readouterr().out) == found

    assert call(register, "published", "--name", "coco") == 0
    assert capsys.readouterr().out == "models:/coco/1 = models:/coco@challenger\n"

    assert call(weights, "export", "models:/coco@challenger", "out/again.pth") == 0
    assert f"{len(tensors)} tensors" in capsys.readouterr().out
    again = torch.load(tmp_path / "out" / "again.pth", weights_only=True)["model"]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["again.pth"]

    assert call(weights, "import", "coco.pth", "preset.yaml", "runs/published") == 2
    assert "exists already" in capsys.readouterr().err


def test_import_other_classes_take_names_from_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path / "five.pth", 5)
    command = ("import", "five.pth", preset(tmp_path), "runs/five")
    assert call(weights, *command) == 2
    assert "give data.val=SHARDS" in capsys.readouterr().err
    annotations, images = write_synthetic(tmp_path / "drawn", images=4, seed=2, size=96)
    build_shards(annotations, images, tmp_path / "val")
    assert call(weights, *command, "data.val=val", "model.num_classes=6") == 2
    assert not (tmp_path / "runs").exists()
    capsys.readouterr()
    assert call(weights, *command, "data.val=val") == 0
    inference = load_inference(read_run("five").checkpoint)
    assert {c.id: c.name for c in inference.categories} == CATEGORIES
    capsys.readouterr()
    assert call(evaluate, "five", "data.workers=0", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["AP"] >= 0


def test_weights_export_over_its_input_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(tmp_path / "coco.pth", 91)
    other = tmp_path / "runs" / "published" / "checkpoint"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_text("somebody's")
    assert call(weights, "import", "coco.pth", preset(tmp_path), "runs/published") == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.read_text() for path in other.iterdir()] == ["somebody's"]
    assert call(weights, "import", "coco.pth", "preset.yaml", "runs/mine") == 0
    state = Path(read_run("mine").checkpoint) / "state.json"
    before = state.read_bytes()
    assert call(weights, "export", "mine", state) == 2
    assert call(export, "mine", state.with_name("new.pt2")) == 2
    assert state.read_bytes() == before
    assert not state.with_name("new.pt2").exists()


def test_class_settings_detr_excludes_no_object(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": small_detr(num_classes=80, backbone={**RESNET, "weights": "none"}).model_dump(),
            "loss": {"classification": "softmax"},
        }
    )
    torch.manual_seed(0)
    model = build_model(config.model.model_copy(update={"num_classes": 91}))
    torch.save({"model": export_official(model)}, tmp_path / "detr.pth")
    (tmp_path / "detr.yaml").write_text(dump_yaml(config))
    assert call(weights, "import", "detr.pth", "detr.yaml", "detr") == 0
    inference = load_inference(read_run("detr").checkpoint)
    assert inference.config.model.num_classes == 91
    assert len(inference.model.state_dict()["class_embed.weight"]) == 92


def test_resume_imported_run_is_refused(tmp_path: Path) -> None:
    published(tmp_path / "coco.pth", 91)
    assert call(weights, "import", "coco.pth", preset(tmp_path), "runs/published") == 0
    annotations, images = write_synthetic(tmp_path / "drawn", images=4, seed=2, size=96)
    build_shards(annotations, images, tmp_path / "shards")
    config = from_dict({**tiny_config().model_dump(), "name": "published"})
    data = config.data.model_copy(update={"train": "shards", "val": "shards"})
    train_section = config.train.model_copy(update={"global_batch": 2})
    with pytest.raises(RunError, match=r"model\.init_from=.*/runs/published"):
        train(config.model_copy(update={"data": data, "train": train_section}), resume="auto")


def test_import_weights_that_do_not_fit_write_nothing(tmp_path: Path) -> None:
    """A training with such an `init_from`, or its plan, ends before Ray is asked for anything."""
    annotations, images = write_synthetic(tmp_path / "drawn", images=4, seed=2, size=96)
    build_shards(annotations, images, tmp_path / "shards")
    from jobs import train as job

    tiny_checkpoint(tmp_path)
    model = {**tiny_config().model.model_dump(), "init_from": "checkpoint", "levels": 2}
    data = {"train": "shards", "val": "shards"}
    config = from_dict({**tiny_config(data=data).model_dump(), "model": model, "train": {"global_batch": 2}})
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    assert call(job, "run.yaml", "--dry-run") == 2
    assert call(job, "run.yaml") == 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("import", "coco.pth", "preset.yaml"), "jobs.weights import takes FILE CONFIG RUN"),
        (("export", "runs/none"), "jobs.weights export takes RUN|models:/NAME@ALIAS|FOLDER OUT.pth"),
        (("export", "runs/none", "out.pth", "model.dropout=0"), "jobs.weights export takes"),
        (("export", "runs/none", "out.pth"), "there is no run 'runs/none'"),
        (("export", "checkpoint", "out.pth"), "published layout exists only for ResNets"),
        (("import", "absent.pth", "preset.yaml", "runs/x"), "there is no absent.pth"),
        (("import", "coco.pth", "absent.yaml", "runs/x"), "cannot read config absent.yaml"),
        (("import", "coco.pth", "preset.yaml", "runs/x", "model.refine=true"), "two_stage=False"),
        (("import", "coco.pth", "preset.yaml", "s3://bucket/x"), "local folder"),
    ],
)
def test_weights_bad_arguments_exit_2(
    tmp_path: Path, argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path / "coco.pth", 91)
    preset(tmp_path)
    tiny_checkpoint(tmp_path)
    assert call(weights, *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out.pth").exists()


def test_coco_categories_are_eighty() -> None:
    assert len(COCO_CATEGORIES) == 80
    by_id = {category.id: category.name for category in COCO_CATEGORIES}
    assert (by_id[1], by_id[13], by_id[90]) == ("person", "stop sign", "toothbrush")
    assert max(by_id) == 90
    assert sorted(set(range(1, 91)) - set(by_id)) == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]


def test_import_refuses_weights_that_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = published(tmp_path / "coco.pth", 91)
    key = next(iter(tensors))
    heads = {name: torch.tensor(1.0) for name in tensors if "class_embed" in name}
    torch.save({"model": {**tensors, key: tensors[key] * float("nan")}}, tmp_path / "nan.pth")
    torch.save({"model": {**tensors, **heads}}, tmp_path / "scalar.pth")
    torch.save({"model": {1: torch.zeros(1)}}, tmp_path / "keys.pth")
    annotations, images = write_synthetic(tmp_path / "drawn", images=2, seed=2, size=96)
    document = json.loads(annotations.read_text())
    for each in document["categories"]:
        each["id"] += 100
    for each in document["annotations"]:
        each["category_id"] += 100
    annotations.write_text(json.dumps(document))
    build_shards(annotations, images, tmp_path / "val")
    for words, named in (
        (["nan.pth"], f"not finite in {key}"),
        (["scalar.pth"], "classes of these weights are not known"),
        (["keys.pth"], "neither a `model` with tensors"),
        (["coco.pth", "data.val=val"], "category ids 101, "),
    ):
        assert call(weights, "import", words[0], preset(tmp_path), "runs/new", *words[1:]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_weights_export_onto_a_full_disk_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files stands for the full disk; torch's own writer would end this process."""
    published(tmp_path / "coco.pth", 91)
    assert call(weights, "import", "coco.pth", preset(tmp_path), "runs/mine") == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        assert call(weights, "export", "mine", "out/mine.pth") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write out/mine.pth: File too large; free space" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []

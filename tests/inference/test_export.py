"""Exported graphs equal the model, at any size and number of images; unsupported models raise."""

import gc
import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.helpers import NAMES, tiny_checkpoint, tiny_config
from support.model import small_config, small_detr
from torch import Tensor

from jobs import export as job
from jobs.cli import main
from pipeline.checkpoint import Inference, load_inference
from pipeline.config import ModelConfig
from pipeline.data.batch import Item, collate
from pipeline.errors import ExportError, StorageError
from pipeline.inference import export
from pipeline.inference.export import Exported, Graph, check, describe, trace, write_archive, write_onnx
from pipeline.model.postprocess import postprocess

SHALLOW = {"enc_layers": 1, "dec_layers": 2}  # one layer that refines another is all there is to get wrong
DCN = {"name": "resnet50", "weights": "none", "deformable_conv": True}
MODELS: dict[str, ModelConfig] = {
    "one_stage": small_config(**SHALLOW),
    "refine": small_config(refine=True, **SHALLOW),
    "two_stage": small_config(refine=True, two_stage=True, queries=40, **SHALLOW),  # more than tokens at 33 px
    "single_scale": small_config(levels=1, **SHALLOW),
    "own_level": small_config(cross_level=False, **SHALLOW),
    "fpn": small_config(neck="fpn", **SHALLOW),
    "bifpn": small_config(neck="bifpn", **SHALLOW),
    "dcn": small_config(backbone=DCN, **SHALLOW),
    "norm_valid": small_config(norm_valid=True, levels=4, **SHALLOW),
    "norm_valid_two_stage": small_config(norm_valid=True, refine=True, two_stage=True, queries=40, **SHALLOW),
    "detr": small_detr(**SHALLOW),
    "detr_plus": small_detr(class_head="sigmoid", **SHALLOW),
}
TOP_K = 30


def inference_of(folder: Path, name: str, **sections: Any) -> Inference:
    model = MODELS[name]
    loss = {"classification": "softmax" if model.class_head == "softmax" else "focal"}
    config = tiny_config(model=model.model_dump(), loss=loss, **sections)
    return load_inference(tiny_checkpoint(folder, config=config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def inference(folder: Path) -> Inference:
    return inference_of(folder, "one_stage")


@pytest.fixture(scope="module")
def exported(inference: Inference) -> Exported:
    """Decomposed, for images of any size."""
    return trace(inference, TOP_K)


def run_onnx(path: Path, images: Tensor, sizes: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(o) for o in session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})]


def test_trace_graph_equals_the_evaluation(inference: Inference) -> None:
    """Padded images in a batch: the same detections as from the loader's batch, relative instead of in pixels."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    images = [
        Image.fromarray(torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).numpy())
        for h, w in ((64, 96), (80, 72))
    ]
    boxes, labels = torch.zeros(0, 4).numpy(), torch.zeros(0, dtype=torch.long).numpy()
    batch = collate([Item(p, boxes, labels, 0, (p.height, p.width)) for p in images], 0, 1.0)
    garbage = batch.images.clone()
    garbage[batch.mask[:, None].expand_as(garbage)] = 77  # what lies in the padding does not matter
    with torch.no_grad():
        scores, found, corners = Graph(inference.model, TOP_K).eval()(garbage, batch.sizes)
        moved = batch.to(torch.device("cpu"))
        expected = postprocess(inference.model(moved.images, moved.mask), batch.sizes, TOP_K)
    for k, image in enumerate(expected):
        torch.testing.assert_close(scores[k], image["scores"], rtol=1e-5, atol=1e-6)
        assert torch.equal(found[k], image["labels"])
        pixels = corners[k] * batch.sizes[k].flip(0).repeat(2)
        torch.testing.assert_close(pixels, image["boxes_xyxy"], rtol=1e-5, atol=1e-3)


def test_write_onnx_any_size_agrees(exported: Exported, folder: Path) -> None:
    path = folder / "out" / "model.onnx"
    assert write_onnx(exported, path) == 1.0
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert {node.domain for node in proto.graph.node} == {""}  # nothing but ONNX's own operators
    assert not {node.op_type for node in proto.graph.node} & {"GridSample", "CastLike"}
    assert [i.name for i in proto.graph.input] == ["images", "sizes"]
    assert [d.dim_param for d in proto.graph.input[0].type.tensor_type.shape.dim if d.dim_param] == [
        "batch",
        "height",
        "width",
    ]
    properties = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(properties["names"]) == {str(k): name for k, name in enumerate(NAMES)}
    for number, (height, width) in ((1, (34, 70)), (3, (97, 41)), (2, (128, 160))):  # none of them a trial
        images = torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[height - 3 * k, width - 5 * k] for k in range(number)])
        with torch.no_grad():
            expected = exported.eager(images, sizes)
        scores, labels, boxes = run_onnx(path, images, sizes)
        torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=1e-5)
        alike = labels == expected[1]  # ranks may change where scores are equal to rounding
        assert alike.float().mean() > 0.95
        torch.testing.assert_close(boxes[alike], expected[2][alike], rtol=1e-4, atol=1e-4)


def test_archive_needs_nothing_of_this_project(exported: Exported, folder: Path) -> None:
    path = folder / "model.pt2"
    assert write_archive(exported, path) == 1.0
    images, sizes = exported.trials[1]
    torch.save({"images": images, "sizes": sizes}, folder / "inputs.pt")
    code = (
        "import sys, torch\n"
        "given = torch.load('inputs.pt')\n"
        "names = {'names': ''}\n"
        "program = torch.export.load('model.pt2', extra_files=names)\n"
        "torch.save([names['names'], *program.module()(given['images'], given['sizes'])], 'outputs.pt')\n"
        "assert not [name for name in sys.modules if name.startswith('pipeline')]\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    names, *found = torch.load(folder / "outputs.pt")
    assert json.loads(names) == {str(k): name for k, name in enumerate(NAMES)}
    with torch.no_grad():
        expected = exported.eager(images, sizes)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("write", [pytest.param(write_onnx, marks=pytest.mark.slow), write_archive])
def test_export_onto_a_full_disk_is_an_error_that_leaves_nothing(
    write: Callable[[Exported, Path], float], exported: Exported, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk; torch's own writer would end this process.

    The error is in a cycle, so that garbage collection meets all that it holds: a view of the packed bytes crashed it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StorageError, match=r"model\.bin") as raised:
            write(exported, tmp_path / "model.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    raised.value.__dict__["itself"] = raised.value
    del raised
    gc.collect()


def test_archive_that_keeps_the_operator(inference: Inference, tmp_path: Path) -> None:
    kept = trace(inference, TOP_K, keep_op=True)
    assert "ms_deform_attn_fused" in kept.program.graph_module.code
    assert write_archive(kept, tmp_path / "kept.pt2") == 1.0
    images, sizes = kept.trials[1]
    with torch.no_grad():
        expected = kept.eager(images, sizes)
    found = torch.export.load(tmp_path / "kept.pt2").module()(images, sizes)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # other tests export any size, and one size of every variant
def test_one_size_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    inference_of(tmp_path, "two_stage")
    path = tmp_path / "model.onnx"
    caplog.set_level(logging.INFO)  # as commands log: thousands of lines, if the packages were let
    assert main(job.build_parser(), job.run, [f"{tmp_path}/checkpoint", str(path), "--size", "96x128"]) == 0
    assert "images of 96x128; 100.0% of its detections agree" in capsys.readouterr().out
    assert [record.name for record in caplog.records if not record.name.startswith("pipeline")] == []
    image = onnx.load(path).graph.input[0]
    assert [d.dim_value or d.dim_param for d in image.type.tensor_type.shape.dim] == ["batch", 3, 96, 128]
    scores, *_ = run_onnx(path, torch.zeros(3, 3, 96, 128, dtype=torch.uint8), torch.tensor([[96, 128]] * 3))
    assert scores.shape == (3, 100)
    assert main(job.build_parser(), job.run, [f"{tmp_path}/checkpoint", str(path), "--size", "32x64"]) == 2
    assert "64x64" in capsys.readouterr().err  # 40 queries need as many tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_trace_every_variant_agrees(name: str, tmp_path: Path) -> None:
    inference = inference_of(tmp_path, name)
    if name == "bifpn":  # it pools by a rule that depends on the sizes
        with pytest.raises(ExportError, match="--size"):
            trace(inference, TOP_K)
    exported = trace(inference, TOP_K, (96, 128) if name == "bifpn" else None)
    assert write_onnx(exported, tmp_path / "model.onnx") == 1.0
    assert write_archive(exported, tmp_path / "model.pt2") == 1.0


def test_raw_labels_are_described_by_their_ids(inference: Inference, tmp_path: Path) -> None:
    raw = inference.config.model_copy(update={"data": inference.config.data.model_copy(update={"labels": "raw"})})
    found = describe(Inference(raw, inference.categories, inference.model, inference.state))
    assert json.loads(found["names"]) == {str(10 * (k + 1)): name for k, name in enumerate(NAMES)}
    assert json.loads(found["category_ids"])["50"] == 50
    assert (found["shortest_side"], found["longest_side"]) == ("96", "128")


def stub(inference: Inference, program: Any = None) -> Exported:
    trials = ((torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]])),)
    return Exported(program, Graph(inference.model, TOP_K).eval(), {}, trials, {})


def test_check_wrong_graph_raises(inference: Inference) -> None:
    good = stub(inference)
    with torch.no_grad():
        scores, labels, boxes = good.eager(*good.trials[0])
    order = torch.arange(TOP_K - 1, -1, -1)
    assert check(lambda *_: (scores[:, order], labels[:, order], boxes[:, order]), good) == 1.0
    wrong = [(scores, labels, boxes + 0.01), (scores, labels + 1, boxes), (scores + 0.01, labels, boxes)]
    for outputs in [*wrong, (scores, labels, boxes * float("nan"))]:
        with pytest.raises(ExportError, match=r"\d%"):
            check(lambda *_, o=outputs: o, good)


def test_trace_unsupported_models_raise(inference: Inference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"32x32.* 16x200"):
        trace(inference, TOP_K, (16, 200))
    with pytest.raises(ExportError, match="no side may exceed 8192 px"):
        trace(inference, TOP_K, (64, 10**6))
    other = inference.config.model_copy(update={"model": ModelConfig(name="fcos")})
    with pytest.raises(ExportError, match=r"model\.name=fcos"):
        trace(Inference(other, inference.categories, inference.model, inference.state), TOP_K)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/model\.pt2"):
        write_archive(stub(inference), tmp_path / "file" / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="onnxruntime"):
        write_onnx(stub(inference), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_trace_keep_op_without_operator_raises(
    inference: Inference, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.model.ops.sampling._choose", lambda impl, device: "torch")
    with caplog.at_level(logging.ERROR), pytest.raises(ExportError, match=r"jobs\.doctor"):
        trace(inference, TOP_K, (64, 64), keep_op=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing", "out.bin"], "write OUT.onnx or OUT.pt2"),
        (["nothing", "out.onnx", "--keep-op"], "--keep-op"),
        (["nothing", "out.onnx", "--size", "800"], "such as 800x1333"),
        (["nothing", "out.onnx", "--size", "²x²"], "such as 800x1333"),
        (["nothing", "out.onnx", "--top-k", "0"], "--top-k 0 must be at least 1"),
        (["nothing", "out.onnx"], "there is no run 'nothing'"),
    ],
)
def test_export_bad_arguments_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(job.build_parser(), job.run, argv) == 2
    assert message in capsys.readouterr().err


def test_least_side_has_enough_tokens(tmp_path: Path) -> None:
    for name, least in (("one_stage", 32), ("two_stage", 64)):
        assert export._least_side(inference_of(tmp_path, name)) == least

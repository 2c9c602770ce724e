"""EXIF orientation: decided once for a set, refused if undecided, and applied by all readers of the shards."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data import contents, edit, stopped_at_the_index, write_coco
from support.exif import block_of, off_by, write_scenes
from support.paths import SHARED

from pipeline.data.dataset import DetectionDataset
from pipeline.data.index import load_index
from pipeline.data.sharding import lint
from pipeline.data.sharding.both_ways import draw_both_ways
from pipeline.data.sharding.diff import diff_shards
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.orientation import Exif, RotatedImage, decide
from pipeline.data.sharding.rules import Findings, Rule
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.summary import SUMMARY, load_summary
from pipeline.data.sharding.verify import verify_shards
from pipeline.errors import AnnotationError, ShardError

CASES = SHARED / "cases" / "exif"
COCO = CASES.parents[1] / "coco_sample"
ALL = range(1, 9)

TALL, WIDE, SQUARE = (9, 5), (5, 9), (7, 7)
SAYS_DISPLAYED, SAYS_STORED = RotatedImage("d", 6, WIDE, TALL), RotatedImage("s", 8, WIDE, WIDE)
SAYS_NOTHING, SAYS_NEITHER = RotatedImage("n", 3, WIDE, WIDE), RotatedImage("x", 6, WIDE, SQUARE)
SQUARE_TURNED = RotatedImage("q", 6, SQUARE, SQUARE)
DECISIONS: list[tuple[Exif, list[RotatedImage], bool, dict[Rule, int]]] = [
    ("auto", [], False, {}),
    ("auto", [SAYS_DISPLAYED, SAYS_NOTHING], True, {Rule.EXIF_APPLIED: 2}),
    ("auto", [SAYS_STORED, SAYS_NOTHING], False, {Rule.EXIF_IGNORED: 2}),
    ("auto", [SAYS_NOTHING, SQUARE_TURNED], False, {Rule.EXIF_UNDECIDED: 2}),
    ("auto", [SAYS_DISPLAYED, SAYS_STORED, SAYS_NOTHING], False, {Rule.EXIF_CONTRADICTION: 2}),
    ("auto", [SAYS_NEITHER], False, {Rule.WRONG_SIZE: 1}),
    ("auto", [SAYS_NEITHER, SAYS_NOTHING], False, {Rule.WRONG_SIZE: 1, Rule.EXIF_UNDECIDED: 1}),
    ("auto", [SAYS_NEITHER, SAYS_DISPLAYED], True, {Rule.WRONG_SIZE: 1, Rule.EXIF_APPLIED: 2}),
    ("apply", [SAYS_NOTHING, SQUARE_TURNED], True, {Rule.EXIF_APPLIED: 2}),
    ("apply", [SAYS_STORED], True, {Rule.WRONG_SIZE: 1, Rule.EXIF_APPLIED: 1}),
    ("ignore", [SAYS_NOTHING, SQUARE_TURNED], False, {Rule.EXIF_IGNORED: 2}),
    ("ignore", [SAYS_DISPLAYED], False, {Rule.WRONG_SIZE: 1, Rule.EXIF_IGNORED: 1}),
    ("ignore", [SAYS_DISPLAYED, SAYS_STORED], False, {Rule.WRONG_SIZE: 1, Rule.EXIF_IGNORED: 2}),
]


@pytest.mark.parametrize(("exif", "turned", "applied", "rules"), DECISIONS)
def test_decide_by_sizes_and_flag(
    exif: Exif, turned: list[RotatedImage], applied: bool, rules: dict[Rule, int]
) -> None:
    findings = Findings()
    assert decide(turned, exif, findings) is applied
    assert {rule: count for rule, count, _ in findings} == rules


@pytest.mark.parametrize("boxes", ["displayed", "stored"])
@pytest.mark.parametrize(("kind", "resample"), [("JPEG", "fused"), ("PNG", "reference")])
def test_loader_any_orientation_matches_boxes(tmp_path: Path, boxes: str, kind: str, resample: str) -> None:
    source = write_scenes(tmp_path, ALL, boxes, kind=kind)
    index = build_shards(*source, tmp_path / "out")
    assert off_by(index.folder, resample) <= 2
    sizes = {tuple(size) for size in index.sizes().tolist()}
    assert sizes == ({(64, 96)} if boxes == "displayed" else {(64, 96), (96, 64)})
    assert load_summary(index).turned == (7 if boxes == "displayed" else 0)
    assert verify_shards(index.folder) == []


@pytest.mark.parametrize(("boxes", "exif", "other"), [("displayed", "apply", "ignore"), ("stored", "ignore", "apply")])
def test_build_undecided_orientation_is_refused_without_exif(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boxes: str, exif: Exif, other: Exif
) -> None:
    monkeypatch.setattr(lint, "IMAGES_PER_TASK", 2)
    source, out = write_scenes(tmp_path, (1, 2, 3, 4, 3), boxes), tmp_path / "out"
    with pytest.raises(AnnotationError, match=r"\(4\): [\s\S]*1 of orientation 2, 2 of orientation 3, [\s\S]*--draw"):
        build_shards(*source, out)
    assert not out.exists()
    build_shards(*source, out, exif=exif)
    assert off_by(out) <= 2
    build_shards(*source, tmp_path / "wrong", exif=other)
    assert off_by(tmp_path / "wrong") > 2, "the flag counts"
    assert diff_shards(str(out), str(tmp_path / "wrong")) == ["4 images have another EXIF orientation: 2, 3, 4, 5"]
    before = contents(out)
    with pytest.raises(ShardError, match=str(out)):
        build_shards(*source, out, exif=other)
    build_shards(*source, out, exif=exif)
    assert contents(out) == before


def test_build_contradicting_sizes_are_refused(tmp_path: Path) -> None:
    path, folder = write_scenes(tmp_path, (6, 8, 3), "displayed")
    images = json.loads(path.read_text())["images"]
    images[1] |= {"width": images[1]["height"], "height": images[1]["width"]}
    edit(path, {"images": images})
    with pytest.raises(AnnotationError, match=r"\b1 .*\(1\.jpg\), 1 .*\(2\.jpg\)"):
        build_shards(path, folder, tmp_path / "out")
    with pytest.raises(AnnotationError, match=r"\(1\): 2\.jpg .*64 x 96.*96 x 64"):
        build_shards(path, folder, tmp_path / "out", exif="apply")


def test_build_again_with_another_exif_rewrites_tars(tmp_path: Path) -> None:
    source, out, whole = write_scenes(tmp_path, (1, 3, 3, 2), "displayed"), tmp_path / "out", tmp_path / "whole"
    with stopped_at_the_index(), pytest.raises(KeyboardInterrupt):
        build_shards(*source, out, exif="ignore", samples_per_shard=2)
    build_shards(*source, out, exif="apply", samples_per_shard=2)
    build_shards(*source, whole, exif="apply", samples_per_shard=2)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("exif", ["auto", "apply", "ignore"])
def test_build_without_orientation_writes_version_1(tmp_path: Path, exif: Exif) -> None:
    index = build_shards(*write_coco(tmp_path), tmp_path / "out", exif=exif)
    assert index.version == 1
    assert all("orientation" not in DetectionDataset(index.folder).read_annotations(i) for i in range(len(index)))
    assert "turned" not in json.loads((tmp_path / "out" / SUMMARY).read_text())


def test_build_with_orientation_writes_version_2_with_original_bytes(tmp_path: Path) -> None:
    annotations, folder = write_scenes(tmp_path, (1, 6), "displayed")
    data = DetectionDataset(build_shards(annotations, folder, tmp_path / "out").folder)
    assert data.index.version == 2
    assert [data.read_annotations(i).get("orientation") for i in (0, 1)] == [None, 6]
    assert [data.read_image(i) for i in (0, 1)] == [(folder / f"{k}.jpg").read_bytes() for k in (1, 2)]
    assert list(data.read_annotations(1)) == sorted(data.read_annotations(1)), "records have sorted keys"


@pytest.mark.parametrize(
    ("orientation", "message"), [(8, "has orientation 8 in its record, 6 in"), (9, "EXIF orientation")]
)
def test_verify_wrong_orientation_in_record_is_found(tmp_path: Path, orientation: int, message: str) -> None:
    from support.shards import reseal

    annotations, folder = write_scenes(tmp_path, (6,), "displayed")
    index = build_shards(annotations, folder, tmp_path / "out")
    tar = tmp_path / "out" / index.shards[0].name
    tar.write_bytes(tar.read_bytes().replace(b'"orientation":6', b'"orientation":%d' % orientation))
    reseal(tmp_path / "out")
    (fault,) = verify_shards(index.folder)
    assert message in fault
    if orientation == 9:
        with pytest.raises(ShardError, match=r"orientation.*9"):
            DetectionDataset(index.folder).sample(0)


def test_decode_at_least_rotated_image_keeps_positions(tmp_path: Path) -> None:
    annotations, folder = write_scenes(tmp_path, (1, 3), "displayed", size=(128, 193))
    data = DetectionDataset(build_shards(annotations, folder, tmp_path / "out", exif="apply").folder)
    straight, turned = (data.sample(i, at_least=(16, 16)) for i in (0, 1))
    assert (straight.shrink, turned.shrink) == (8, 1), "193 is odd: a mirrored side would start with a partial pixel"
    annotations, folder = write_scenes(tmp_path / "even", (1, 3), "displayed", size=(128, 192))
    data = DetectionDataset(build_shards(annotations, folder, tmp_path / "even" / "out", exif="apply").folder)
    for sample in (data.sample(i, at_least=(64, 96)) for i in (0, 1)):
        assert sample.shrink == 2
        np.testing.assert_allclose(block_of(np.asarray(sample.image)), sample.boxes_xyxy[0] / 2, atol=2)


def test_draw_both_ways_shows_stored_left_and_displayed_right(tmp_path: Path) -> None:
    annotations, folder = write_scenes(tmp_path, (1, 6, 3, 6), "displayed")
    found = examine(annotations, str(folder))
    paths = draw_both_ways(found.rotated, tmp_path / "drawn")
    assert [path.name for path in paths] == ["000000000003.png", "000000000002.png", "000000000004.png"]
    pixels = np.asarray(Image.open(paths[1]).convert("RGB")).astype(int)
    boxes = (np.abs(pixels - (255, 40, 120)).sum(axis=2) < 30).nonzero()[1]
    middle = pixels.shape[1] // 2
    assert (boxes < middle).sum() > 100 < (boxes > middle).sum()
    with pytest.raises(AnnotationError, match=f"--draw {tmp_path}/drawn"):
        draw_both_ways(found.rotated, tmp_path / "drawn")


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not there")
def test_shared_exif_cases_are_covered(tmp_path: Path) -> None:
    for name in ("displayed", "stored"):
        build_shards(CASES / f"{name}.json", CASES / "images", tmp_path / name)
        assert off_by(tmp_path / name) <= 2
    with pytest.raises(AnnotationError, match="2 of orientation 3"):
        build_shards(CASES / "undecidable_displayed.json", CASES / "images", tmp_path / "out")
    build_shards(CASES / "undecidable_displayed.json", CASES / "images", tmp_path / "out", exif="apply")
    assert off_by(tmp_path / "out") <= 2


@pytest.mark.skipif(not COCO.is_dir(), reason=f"{COCO} is not there")
@pytest.mark.parametrize(
    ("split", "digest", "index_sha256"),
    [
        ("train", "bd8e3c969e741b4b3fcff619d557fdb8b82e3d024593f15d26cb14264ffbcc14", "513c29f492d409a5"),
        ("val", "6ec170a32c995c7f832eaa97df5858fb9980086c9919c53502480b0c1f7a48f4", "4846d0fcb91d700a"),
    ],
)
def test_dataset_digest_equals_version_0_1(tmp_path: Path, split: str, digest: str, index_sha256: str) -> None:
    import hashlib

    annotations = COCO / "annotations" / f"instances_{split}2017.json"
    assert build_shards(annotations, COCO / f"{split}2017", tmp_path / "out").digest == digest
    assert hashlib.sha256((tmp_path / "out" / "index.json").read_bytes()).hexdigest().startswith(index_sha256)
    assert load_index(str(tmp_path / "out")).version == 1

"""Lint and build agree: for every fault, and for data without faults."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import PngImagePlugin
from support.annotations import REFUSED
from support.data import CATEGORIES, contents, edit, noise_image, pack, with_orientation, write_coco

from pipeline.data.images import check_decodes
from pipeline.data.sharding import lint
from pipeline.data.sharding.lint import examine
from pipeline.data.sharding.rules import Rule, Treatment
from pipeline.data.sharding.shards import build_shards
from pipeline.errors import AnnotationError, PipelineError, ResourceError


def found(tmp_path: Path, **options: Any) -> dict[Rule, list[str]]:
    findings = examine(tmp_path / "instances.json", str(tmp_path / "images"), decode=True, **options).findings
    return {rule: examples for rule, _, examples in findings}


def builds(tmp_path: Path) -> bool:
    """Whether a build of the same data succeeds; if not, it leaves nothing."""
    before = contents(tmp_path)
    try:
        build_shards(tmp_path / "instances.json", tmp_path / "images", tmp_path / "out")
    except PipelineError:
        assert contents(tmp_path) == before
        return False
    return True


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-150])


def long_header(path: Path) -> None:
    noise_image((48, 64), 1).save(path, icc_profile=bytes(100_000))


def bomb(path: Path) -> None:
    import zlib

    noise_image((48, 64), 1).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def text_bomb(path: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("comment", "x" * 8_000_000, zip=True)
    noise_image((48, 64), 1).save(path, "PNG", pnginfo=notes)
    assert path.stat().st_size < 20_000


IMAGES: list[tuple[Callable[[Path], object], Rule | None, str]] = [
    (os.unlink, Rule.MISSING_FILE, "some_3.jpg"),
    (cut, Rule.UNREADABLE_FILE, "some_3.jpg does not decode: "),
    (bomb, Rule.UNREADABLE_FILE, "some_3.jpg has more than 64,000,000 pixels"),
    (text_bomb, Rule.UNREADABLE_FILE, "some_3.jpg has a broken png header: Decompressed data too large"),
    (lambda path: path.write_bytes(b""), Rule.UNREADABLE_FILE, "some_3.jpg is neither JPEG nor PNG"),
    (lambda path: path.write_bytes(b"\x80\x04\x95"), Rule.UNREADABLE_FILE, "some_3.jpg is neither JPEG nor PNG"),
    (
        lambda path: path.write_bytes(path.read_bytes()[:30]),
        Rule.UNREADABLE_FILE,
        "some_3.jpg has a broken jpg head",
    ),
    (lambda path: [path.unlink(), os.mkfifo(path)], Rule.UNREADABLE_FILE, "some_3.jpg is not a plain file"),
    (
        lambda path: noise_image((64, 48), 1).save(path),
        Rule.WRONG_SIZE,
        "some_3.jpg is 48 x 64, its entry says 64 x 48",
    ),
    (long_header, None, ""),
    (lambda path: noise_image((48, 64), 1).save(path, "PNG"), None, ""),  # a name may lie about the format
]


@pytest.mark.parametrize(("damage", "rule", "example"), IMAGES)
def test_examine_faulty_image_is_finding(
    tmp_path: Path, damage: Callable[[Path], object], rule: Rule | None, example: str
) -> None:
    write_coco(tmp_path)
    damage(tmp_path / "images" / "some_3.jpg")
    refused = {r: e for r, e in found(tmp_path).items() if r.treatment is Treatment.REFUSE}
    assert set(refused) == ({rule} if rule else set())
    if rule:
        assert refused[rule][0].startswith(example)
    assert builds(tmp_path) == (rule is None)


@pytest.mark.parametrize("change", [change for change, _, _ in REFUSED])
def test_examine_without_images_checks_annotations(tmp_path: Path, change: dict[str, Any]) -> None:
    path, folder = write_coco(tmp_path)
    noise_image((9, 9), 1).save(folder / "x.jpg")
    image = {"id": 3, "file_name": "x.jpg", "width": 9, "height": 9}
    edit(path, {"images": [image], "annotations": [], "categories": CATEGORIES})
    edit(path, change)
    try:
        refuses = any(rule.treatment is Treatment.REFUSE for rule in found(tmp_path))
    except PipelineError:  # nothing usable is left, which lint says in the same words
        refuses = True
    assert refuses
    assert not builds(tmp_path)


@pytest.mark.parametrize(("orientation", "turned"), [(0, False), (1, False), (3, True), (6, True), (9, False)])
def test_examine_rotated_image_says_what_is_done(tmp_path: Path, orientation: int, turned: bool) -> None:
    write_coco(tmp_path)
    (tmp_path / "images" / "some_3.jpg").write_bytes(with_orientation(noise_image((48, 64), 1), orientation))
    seen = found(tmp_path, exif="ignore")
    assert seen.get(Rule.EXIF_IGNORED) == ([f"some_3.jpg ({orientation})"] if turned else None)
    assert Rule.WRONG_SIZE not in seen


def test_examine_broken_exif_is_no_finding(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for k, data in enumerate(
        (b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*" + b"\xff" * 40)
    ):
        noise_image((48, 64), 1).save(tmp_path / "images" / "some_3.jpg", exif=data)
        assert not {Rule.EXIF_UNDECIDED, Rule.EXIF_IGNORED, Rule.UNREADABLE_FILE} & set(found(tmp_path)), k


def test_examine_limit_below_one_raises(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    with pytest.raises(AnnotationError, match=r"--limit.* 0"):
        examine(path, str(folder), limit=0)
    with pytest.raises(ResourceError, match=r"--workers.* 0"):
        examine(path, str(folder), workers=0)


def test_build_unusual_data_is_built(tmp_path: Path) -> None:
    write_coco(tmp_path)
    seen = found(tmp_path)
    assert {rule.treatment for rule in seen} == {Treatment.DROP, Treatment.CLAMP, Treatment.KEEP}
    assert builds(tmp_path)


def test_examine_faulty_annotations_and_images_are_found_together(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    tree = json.loads(path.read_text())
    tree["annotations"][0]["category_id"] = 5
    path.write_text(json.dumps(tree))
    cut(folder / "some_80.jpg")
    assert {Rule.UNKNOWN_CATEGORY, Rule.UNREADABLE_FILE} <= set(found(tmp_path))


def test_examine_limit_or_no_images_skips_images(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    cut(folder / "some_80.jpg")
    assert Rule.UNREADABLE_FILE in found(tmp_path)
    assert Rule.UNREADABLE_FILE not in found(tmp_path, limit=11)
    bare = examine(path, None)
    assert (bare.samples, len(bare.source.images)) == ((), 12)
    assert Rule.UNREADABLE_FILE not in {rule for rule, _, _ in bare.findings}


def test_examine_examples_do_not_depend_on_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (write_coco(tmp_path)[1]).iterdir():
        path.write_bytes(b"x")
    whole = found(tmp_path)
    monkeypatch.setattr(lint, "IMAGES_PER_TASK", 2)
    assert found(tmp_path) == whole
    assert len(whole[Rule.UNREADABLE_FILE]) == 5


@pytest.mark.parametrize("archive", ["images.zip", "images.tar"])
def test_examine_archives_give_same_findings(tmp_path: Path, archive: str) -> None:
    path, folder = write_coco(tmp_path)
    cut(folder / "some_80.jpg")
    expected = found(tmp_path)
    packed = pack(folder, tmp_path / archive, "deep/")
    findings = examine(path, str(packed), decode=True).findings
    assert {rule: examples for rule, _, examples in findings} == expected


def test_examine_without_decode_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = write_coco(tmp_path)
    decoded = []
    monkeypatch.setattr(lint, "check_decodes", lambda data, size: [decoded.append(size), check_decodes(data, size)])
    examine(path, str(folder))
    assert decoded == []
    examine(path, str(folder), decode=True)
    assert len(decoded) == 12


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["3", "/x.jpg", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_coco(tmp_path_factory.mktemp("small"), images=3)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_examine_any_entries_give_printable_table(small: tuple[Path, Path], data: st.DataObject) -> None:
    tree = json.loads(small[0].read_text())
    for _ in range(data.draw(st.integers(1, 4))):
        entries = tree[data.draw(st.sampled_from(["images", "annotations", "categories"]))]
        place = data.draw(st.integers(0, len(entries) - 1))
        if not isinstance(entries[place], dict) or not entries[place] or data.draw(st.booleans()):
            entries[place] = data.draw(JUNK)
        elif data.draw(st.booleans()):
            entries[place][data.draw(st.sampled_from(sorted(entries[place])))] = data.draw(JUNK)
        else:
            del entries[place][data.draw(st.sampled_from(sorted(entries[place])))]
    path = small[0].with_name("edited.json")
    path.write_text(json.dumps(tree))
    findings = examine(path, str(small[1]), decode=True).findings
    assert "\n".join(findings.table()).encode()


def test_examine_unlisted_image_is_finding_without_limit(tmp_path: Path) -> None:
    _, folder = write_coco(tmp_path)
    noise_image((9, 9), 1).save(folder / "extra.png")
    assert found(tmp_path)[Rule.UNLISTED_FILE] == ["extra.png"]
    assert Rule.UNLISTED_FILE not in found(tmp_path, limit=3)
    assert builds(tmp_path)

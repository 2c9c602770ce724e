"""Data sets with one fault each: an error or a finding names the file, and nothing is written."""

import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.data import edit
from support.layouts import LAYOUTS, draw_truth, pack_tree

from pipeline.data.importing import tree
from pipeline.data.importing.build import build_dataset
from pipeline.data.importing.dataset import Options, read_dataset
from pipeline.data.sharding.rules import Rule, Treatment
from pipeline.errors import AnnotationError, PipelineError

LABEL = "train/labels/pic 001.txt"
COCO = "train/_annotations.coco.json"
PAGE = "train/pic 001.xml"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_layout(layout: str) -> Path:
        LAYOUTS[layout](draw_truth({"train": 3, "val": 2}), tmp_path / "export")
        return tmp_path / "export"

    return write_layout


def wide_png(width: int, height: int) -> bytes:
    """A PNG of one value that states its size, and little more."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def line(text: str) -> Callable[[Path], None]:
    return written(LABEL, f"0 0.5 0.5 0.2 0.2\n{text}\n")


def written(name: str, data: str | bytes) -> Callable[[Path], None]:
    def write_it(root: Path) -> None:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return write_it


def removed(pattern: str) -> Callable[[Path], None]:
    return lambda root: [path.unlink() for path in root.rglob(pattern)] and None


def copied(name: str, other: str) -> Callable[[Path], None]:
    return lambda root: written(other, (root / name).read_bytes())(root)


def rewritten(name: str, encoding: str) -> Callable[[Path], None]:
    return lambda root: written(name, (root / name).read_text().encode(encoding))(root)


def edited(**change: Any) -> Callable[[Path], None]:
    return lambda root: edit(root / COCO, change)


def emptied(split: str) -> Callable[[Path], None]:
    return lambda root: edit(root / split / "_annotations.coco.json", {"images": [], "annotations": []})


def of_one_class(split: str) -> Callable[[Path], None]:
    """The boxes of a split become those of one class."""

    def change(root: Path) -> None:
        path = root / split / "_annotations.coco.json"
        boxes = json.loads(path.read_text())["annotations"]
        edit(path, {"annotations": [box | {"category_id": boxes[0]["category_id"]} for box in boxes]})

    return change


def in_two_folders(root: Path) -> None:
    (root / "images").rename(root / "a")
    copied("a/pic 001.jpg", "b/pic 001.jpg")(root)


def listed_twice(root: Path) -> None:
    images = json.loads((root / COCO).read_text())["images"]
    edit(root / COCO, {"images": [*images, images[0] | {"id": 99}]})


def nothing(root: Path) -> None:
    pass


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def replace(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new, 1))

    return replace


def first_image(**change: Any) -> Callable[[Path], None]:
    def change_it(root: Path) -> None:
        images = json.loads((root / COCO).read_text())["images"]
        edit(root / COCO, {"images": [images[0] | change, *images[1:]]})

    return change_it


def only_cvat_xml(root: Path) -> None:
    removed("*.xml")(root)
    written("annotations.xml", "<annotations><image name='pic 001.jpg'/></annotations>")(root)


def shares(root: Path) -> None:
    """Boxes in shares of the image, as YOLO has them; the largest leaves it by rounding."""
    boxes = json.loads((root / COCO).read_text())["annotations"]
    edit(root / COCO, {"annotations": [box | {"bbox": [0.25, 0.5, 0.7504, 0.2]} for box in boxes]})


REFUSED: list[tuple[str, Callable[[Path], Any], Rule, str]] = [
    ("roboflow_yolo", line("7 0.5 0.5 0.2 0.2"), Rule.UNKNOWN_CLASS, f"{LABEL} line 2: class 7 of 3"),
    ("roboflow_yolo", line("-1 0.5 0.5 0.2 0.2"), Rule.UNKNOWN_CLASS, f"{LABEL} line 2: class -1 of 3"),
    ("roboflow_yolo", line("1.5 0.5 0.5 0.2 0.2"), Rule.UNKNOWN_CLASS, f"{LABEL} line 2: class 1.5 of 3"),
    ("roboflow_yolo", line("1 0.5 0.5 0.2 1.2"), Rule.NOT_NORMALIZED, f"{LABEL} line 2: 1.2"),
    ("roboflow_yolo", line("1 240 180 60 40"), Rule.NOT_NORMALIZED, f"{LABEL} line 2: 240"),
    ("roboflow_yolo", line("1 0.1 0.1 0.5 -0.4 0.5 0.5"), Rule.NOT_NORMALIZED, f"{LABEL} line 2: -0.4"),
    ("roboflow_yolo", line("1 0.5 0.5 0.2"), Rule.BAD_LABEL, f"{LABEL} line 2: '1 0.5 0.5 0.2' (numbers: 4; a box"),
    (
        "roboflow_yolo",
        line("1 0.5 0.5 0.2 0.2 0.9"),
        Rule.BAD_LABEL,
        f"{LABEL} line 2: '1 0.5 0.5 0.2 0.2 0.9' (numbers: 6; a box has 5, a polygon 7, 9, ...)",
    ),
    ("roboflow_yolo", line("1 0.5 0.5 nan 0.2"), Rule.BAD_LABEL, f"{LABEL} line 2"),
    ("roboflow_yolo", line("cell 0.5 0.5 0.2 0.2"), Rule.BAD_LABEL, f"{LABEL} line 2"),
    (
        "roboflow_yolo",
        written("train/images/pic 001.jpg", wide_png(30_000, 5_000)),
        Rule.UNREADABLE_FILE,
        "train/images/pic 001.jpg has more than 64,000,000 pixels",
    ),
    (
        "roboflow_yolo",
        written("train/images/pic 001.jpg", b"GIF89a"),
        Rule.UNREADABLE_FILE,
        "train/images/pic 001.jpg is neither JPEG nor PNG",
    ),
    ("darknet", removed("pic 001.jpg"), Rule.MISSING_FILE, "data/obj_train_data/pic 001.jpg of train.txt"),
    ("ultralytics", removed("*.txt"), Rule.NO_BOXES, "export (YOLO labels, data.yaml)"),
    ("roboflow_voc", replaced(PAGE, "<xmax>", "<xmax>-"), Rule.SWAPPED_CORNERS, f"{PAGE} object 1: "),
    ("roboflow_voc", replaced(PAGE, "<xmin>", "<xmin>x"), Rule.BAD_LABEL, f"{PAGE} object 1 has no corners"),
    ("roboflow_voc", replaced(PAGE, "<xmin>", "<xmin>inf</xmin><xmin>"), Rule.BAD_LABEL, f"{PAGE} object 1"),
    (
        "roboflow_voc",
        replaced(PAGE, "<annotation>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation>"),
        Rule.BAD_LABEL,
        PAGE,
    ),
    ("roboflow_voc", replaced(PAGE, "</annotation>", ""), Rule.BAD_LABEL, f"{PAGE} is not XML"),
    ("roboflow_voc", replaced(PAGE, "<width>", "<width>9"), Rule.WRONG_SIZE, "train/pic 001.jpg is"),
    ("roboflow_voc", removed("pic 001.jpg"), Rule.MISSING_FILE, f"pic 001.jpg of {PAGE}"),
    (
        "labelme",
        replaced("train/pic 001.json", '"points": [[', '"points": [["x", '),
        Rule.BAD_LABEL,
        "train/pic 001.json shape 1",
    ),
    (
        "labelme",
        replaced("train/pic 001.json", '"label": "', '"labels": "'),
        Rule.BAD_LABEL,
        "train/pic 001.json shape 1",
    ),
    ("labelme", written("train/pic 001.json", '{"shapes": []'), Rule.BAD_LABEL, "train/pic 001.json"),
    (
        "roboflow_coco",
        first_image(width=30_000, height=5_000),
        Rule.BAD_SIZE,
        f"{COCO}: image 0, train/pic 001.jpg (30000 x 5000: more than 64,000,000 pixels, scale it down)",
    ),
    ("roboflow_coco", first_image(id=1), Rule.REPEATED_IMAGE, f"{COCO}: 1"),
    ("roboflow_coco", first_image(file_name="../../etc/passwd"), Rule.BAD_FILE_NAME, f"{COCO}: '../../etc/passwd'"),
    ("roboflow_coco", first_image(file_name="gone.jpg"), Rule.MISSING_FILE, f"gone.jpg of {COCO}"),
    ("roboflow_coco", edited(images=[], annotations=[]), Rule.EMPTY_LIST, f"{COCO}: images"),
    ("ultralytics", removed("pic *.[jp]*g"), Rule.NO_IMAGES, "export (YOLO labels, data.yaml)"),
    ("roboflow_coco", shares, Rule.SHARES, f"{COCO}: annotation 0 of image 0 (train/pic 001.jpg) is 0.25, "),
    ("roboflow_coco", written("train/pic 001.jpg", b"\xff\xd8\xff\xe0"), Rule.UNREADABLE_FILE, "train/pic 001.jpg"),
]


@pytest.mark.parametrize(("layout", "harm", "rule", "example"), REFUSED)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_bad_input_is_a_finding_that_names_the_file_and_nothing_is_written(
    tmp_path: Path,
    write: Callable[[str], Path],
    layout: str,
    harm: Callable[[Path], Any],
    rule: Rule,
    example: str,
    packed: bool,
) -> None:
    source = write(layout)
    harm(source)
    source = pack_tree(source, tmp_path / "export.zip") if packed else source
    if packed:
        example = example.replace("export (", "export.zip (")
    found = read_dataset(str(source), Options())
    assert rule.treatment is Treatment.REFUSE
    assert any(kind is rule and example in str(examples) for kind, _, examples in found.findings), list(found.findings)
    with pytest.raises(AnnotationError) as refused:
        build_dataset(str(source), tmp_path / "out", Options())
    assert example.partition(": ")[0] in str(refused.value)
    assert not (tmp_path / "out").exists()


KEPT: list[tuple[str, Callable[[Path], Any], Rule, str]] = [
    (
        "roboflow_yolo",
        replaced("data.yaml", "val:", "test: ../test/images\nval:"),
        Rule.EMPTY_SPLIT,
        "data.yaml: test is ../test/images",
    ),
    (
        "roboflow_yolo",
        line("1 0.95 0.5 0.2 0.2"),
        Rule.CROSSES_EDGE,
        "annotation 2 of image 1 (train/images/pic 001.jpg)",
    ),
    ("roboflow_yolo", line("1 0.5 0.5 0 0.2"), Rule.NO_AREA, "(train/images/pic 001.jpg)"),
    ("roboflow_yolo", written("train/labels/gone.txt", ""), Rule.LABEL_WITHOUT_IMAGE, "train/labels/gone.txt"),
    (
        "darknet",
        replaced("train.txt", "data/obj_train_data/pic 002.jpg", "data/obj_train_data/pic 001.jpg"),
        Rule.REPEATED_LISTING,
        "obj_train_data/pic 001.jpg (train)",
    ),
    ("roboflow_coco", emptied("valid"), Rule.EMPTY_SPLIT, "valid/_annotations.coco.json: no image is listed"),
    ("roboflow_coco", of_one_class("train"), Rule.NEVER_TRAINED, "("),
    ("roboflow_coco", listed_twice, Rule.REPEATED_FILE_NAME, f"{COCO}: 'train/pic 001.jpg'"),
    ("roboflow_coco", copied("train/pic 001.jpg", "train/more.jpg"), Rule.UNLISTED_FILE, "train/more.jpg"),
    ("roboflow_voc", replaced(PAGE, "<difficult>0", "<difficult>1"), Rule.DIFFICULT, f"{PAGE} object 1"),
    ("roboflow_voc", nothing, Rule.COUNTS_FROM_0, PAGE),
    ("labelme", nothing, Rule.SHAPE_WITHOUT_AREA, "train/pic 001.json shape 4 ('point')"),
    ("voc_kit", written("ImageSets/Main/val.txt", "gone\n"), Rule.EMPTY_SPLIT, "ImageSets/Main/: val"),
    ("voc_kit", written("ImageSets/Main/val.txt", "gone\n"), Rule.MISSING_LABEL, "gone"),
]


@pytest.mark.parametrize(("layout", "harm", "rule", "example"), KEPT)
def test_odd_input_is_a_finding_that_does_not_stop_a_build(
    tmp_path: Path, write: Callable[[str], Path], layout: str, harm: Callable[[Path], Any], rule: Rule, example: str
) -> None:
    source = write(layout)
    harm(source)
    found = read_dataset(str(source), Options())
    assert any(kind is rule and example in str(examples) for kind, _, examples in found.findings), list(found.findings)
    assert not found.findings.refused()


ERRORS: list[tuple[str, Callable[[Path], Any], tuple[str, ...]]] = [
    (
        "roboflow_coco",
        written("data.yaml", "names: [a]\ntrain: train"),
        (COCO[6:], "data.yaml", "--format coco or yolo"),
    ),
    ("roboflow_coco", written(COCO, '{"images": [}'), (COCO,)),
    ("roboflow_coco", written(COCO, '{"images": [{}], "annotations": []}'), (COCO, "categories")),
    ("roboflow_coco", edited(categories=[{"id": 1, "name": "dog"}]), (COCO, "valid/_annotations", "'cell'", "'dog'")),
    ("roboflow_coco", edited(categories=[{"id": 7, "name": "cell"}]), (COCO, "valid/_annotations", "'cell'")),
    ("roboflow_yolo", replaced("data.yaml", "nc: 3", "nc: 4"), ("data.yaml", "4", "3")),
    ("roboflow_yolo", written("data.yaml", "names: {a: b}\n"), ("data.yaml", "names")),
    ("roboflow_yolo", written("data.yaml", "names: [a\n"), ("data.yaml",)),
    ("roboflow_yolo", written(LABEL, b"\xff\xfe0"), (LABEL, "save it as UTF-8")),
    ("roboflow_yolo", written(LABEL, "é".encode("latin-1")), (LABEL, "save it as UTF-8")),
    ("roboflow_yolo", removed("*.*"), ("holds no files",)),
    ("roboflow_voc", only_cvat_xml, ("annotations.xml", "export it from the labelling tool as one of these")),
    (
        "roboflow_yolo",
        removed("data.yaml"),
        ("no annotations of a known layout", "train/images/pic 001.jpg", "with `names`"),
    ),
    (
        "roboflow_coco",
        rewritten("valid/_annotations.coco.json", "utf-16"),
        ("valid/_annotations.coco.json", "save it as UTF-8"),
    ),
    ("label_studio_coco", copied("result.json", "other.json"), ("other.json", "result.json")),
    ("label_studio_coco", in_two_folders, ("result.json", "a/pic 001.jpg", "b/pic 001.jpg")),
]


@pytest.mark.parametrize(("layout", "harm", "words"), ERRORS)
def test_data_set_that_cannot_be_read_is_an_error_that_names_the_file(
    tmp_path: Path, write: Callable[[str], Path], layout: str, harm: Callable[[Path], Any], words: tuple[str, ...]
) -> None:
    source = write(layout)
    harm(source)
    with pytest.raises(AnnotationError) as refused:
        build_dataset(str(source), tmp_path / "out", Options())
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not (tmp_path / "out").exists()


def test_format_decides_between_two_layouts(tmp_path: Path, write: Callable[[str], Path]) -> None:
    source = write("roboflow_coco")
    LAYOUTS["roboflow_voc"](draw_truth({"train": 3, "val": 2}), source)
    assert read_dataset(str(source), Options(format="voc")).layout.startswith("Pascal VOC")
    assert read_dataset(str(source), Options(format="coco")).layout.startswith("COCO JSON")
    with pytest.raises(AnnotationError, match=r"--format coco or voc"):
        read_dataset(str(source), Options())


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "C:\\evil.jpg", "..\\evil.jpg", "\nevil.jpg"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archive_with_a_name_that_leaves_it_is_refused(
    tmp_path: Path, write: Callable[[str], Path], name: str, kind: str
) -> None:
    archive = pack_tree(write("roboflow_yolo"), tmp_path / f"export.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(archive, "a") as packed:
            packed.writestr(name, b"x")
    else:
        with tarfile.open(archive, "a") as tar:
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(AnnotationError, match="evil"):
        build_dataset(str(archive), tmp_path / "out", Options())
    assert {path.name for path in tmp_path.iterdir()} == {"export", f"export.{kind}"}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")  # zipfile, when the test writes it
def test_archive_with_a_name_twice_is_refused(tmp_path: Path, write: Callable[[str], Path]) -> None:
    archive = pack_tree(write("roboflow_yolo"), tmp_path / "export.zip")
    with zipfile.ZipFile(archive, "a") as packed:
        packed.writestr("data.yaml", "names: [x]")
    with pytest.raises(AnnotationError, match=r"'data\.yaml'"):
        build_dataset(str(archive), tmp_path / "out", Options())


def test_link_in_a_tar_is_not_followed(tmp_path: Path, write: Callable[[str], Path]) -> None:
    folder = write("roboflow_yolo")
    (folder / LABEL).unlink()
    archive = pack_tree(folder, tmp_path / "export.tar")
    with tarfile.open(archive, "a") as tar:
        link = tarfile.TarInfo(LABEL)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(AnnotationError, match=f"{LABEL} .* symbolic link"):
        build_dataset(str(archive), tmp_path / "out", Options())


def test_bombs_are_refused_before_they_are_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "PLAIN_BYTES", 2**16)
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("train/_annotations.coco.json", '{"images": [' + " " * 2**20 + "]}")
        packed.writestr("train/a.jpg", b"x")
    with pytest.raises(AnnotationError, match=r"_annotations\.coco\.json"):
        build_dataset(str(archive), tmp_path / "out", Options())
    monkeypatch.setattr(tree, "PLAIN_TOTAL_BYTES", 2**16)
    with pytest.raises(AnnotationError, match=r"bomb\.zip"):
        build_dataset(str(archive), tmp_path / "out", Options())


@pytest.mark.parametrize("data", [b"{}", b"\x1f\x8b\x08\0", b"7z\xbc\xaf\x27\x1c", b"PK\3\4broken", b"", b"text"])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "export.bin"
    path.write_bytes(data)
    with pytest.raises(AnnotationError, match=r"export.bin"):
        build_dataset(str(path), tmp_path / "out", Options())


@pytest.mark.parametrize("source", ["s3://bucket/x", "pipe:cat", "nowhere"])
def test_path_that_is_no_data_set_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(PipelineError):
        build_dataset(source, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()

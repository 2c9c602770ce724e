"""The same images from every form of source, and clear errors for what is none."""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from PIL import Image
from support.data import pack, write_coco
from support.helpers import write_image

from pipeline.data.sharding.shards import build_shards
from pipeline.errors import ConfigError, InputError
from pipeline.inference.image_sources import ImageSource, list_images, number_images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An annotation file and the folder of its images."""
    return write_coco(tmp_path_factory.mktemp("coco"), images=4)


def contents(sources: list[str]) -> dict[str, bytes]:
    """The bytes of all images by their base names."""
    return {image.name.rpartition("/")[2]: image.read() for image in list_images(sources)}


def as_zip(folder: Path, out: Path) -> list[str]:
    return [str(pack(folder, out / "images.zip", "data/", zipfile.ZIP_DEFLATED))]


def as_tar(folder: Path, out: Path) -> list[str]:
    with tarfile.open(out / "images.tar", "w") as tar:
        tar.add(folder, "images")
    return [str(out / "images.tar")]


def as_list(folder: Path, out: Path) -> list[str]:
    names = sorted(folder.iterdir())
    lines = [
        os.path.relpath(names[0], out),
        "# a comment",
        "",
        str(names[1]),
        *(f"file://{name}" for name in names[2:]),
    ]
    (out / "list.txt").write_text("\n".join(lines))
    return [str(out / "list.txt")]


def as_urls(folder: Path, out: Path) -> list[str]:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/sources/", recursive=True)
    return [f"memory://{path}" for path in store.find("/sources") if path.endswith((".jpg", ".png"))]


@pytest.mark.parametrize(
    "form",
    [
        as_zip,
        as_tar,
        as_list,
        as_urls,
        lambda folder, _: [f"{folder}/*.*"],
        lambda folder, _: [f"{folder.parent}/**/*.*"],
        lambda folder, _: [*map(str, folder.iterdir())],
        lambda folder, _: [str(folder), str(folder / next(folder.iterdir()).name)],
    ],
    ids=["zip", "tar", "list", "urls", "glob", "deep glob", "files", "twice"],
)
def test_list_images_every_form_gives_the_bytes_of_the_folder(
    form: Callable[[Path, Path], list[str]], dataset: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = dataset[1]
    expected = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(expected) == 4
    assert contents([str(folder)]) == expected
    sources = form(folder, tmp_path)
    assert contents(sources) == expected
    assert len(list_images(sources)) == 4, "an image that is named twice comes once"


def test_list_images_names_that_cannot_be_printed_are_two_images(tmp_path: Path) -> None:
    for name in (b"\xfe.jpg", b"\xff.jpg"):
        write_image(tmp_path / os.fsdecode(name))
    images = list_images([str(tmp_path)])
    assert len(images) == 2
    assert len({image.name for image in images}) == 1


def test_list_images_shards_local_and_remote_keep_ids_and_bytes(dataset: tuple[Path, Path], tmp_path: Path) -> None:
    build_shards(*dataset, tmp_path / "shards")
    fsspec.filesystem("memory").put(f"{tmp_path}/shards/", "/remote-shards/", recursive=True)
    expected = sorted(path.read_bytes() for path in dataset[1].iterdir())
    for source in (str(tmp_path / "shards"), "memory://remote-shards"):
        images = list_images([source])
        assert sorted(image.read() for image in images) == expected
        assert number_images(images) == [image.id for image in images]


def test_list_images_names_of_a_folder_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only" / "wrapper").mkdir(parents=True)
    write_image(tmp_path / "only" / "wrapper" / "a.jpg")
    for source in ("only", "."):
        (image,) = list_images([source])
        assert Path(image.name).read_bytes() == image.read()


def test_list_images_other_formats_are_read_as_png(tmp_path: Path) -> None:
    original = Image.open(write_image(tmp_path / "a.png"))
    original.save(tmp_path / "b.bmp")
    read = [Image.open(io.BytesIO(image.read())) for image in list_images([str(tmp_path)])]
    assert [image.format for image in read] == ["PNG", "PNG"]
    assert read[1].convert("RGB").tobytes() == original.tobytes()


def test_list_images_faults_of_one_image_wait_until_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "link.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "list.txt").write_text("absent.jpg\nmemory://absent/x.jpg\n.\nlink.jpg\n")
    images = list_images([str(tmp_path / "list.txt"), str(tmp_path)])
    assert len(images) == 4, "the link is in the list and in the folder"
    for image in images:
        with pytest.raises(InputError, match=r"cannot be read|not a plain file"):
            image.read()


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("absent.jpg", r"absent\.jpg"),
        ("absent/*.jpg", r"absent/\*\.jpg"),
        ("empty", "empty"),
        ("notes.txt", r"notes\.txt"),
        ("bytes.txt", "UTF-8"),
        ("hostile.zip", r"\.\./a\.jpg"),
        ("notes.pdf", r"notes\.pdf"),
        ("memory://absent/shards", "memory://absent/shards"),
        ("memory://a/images.zip", "download"),
        ("pipe:cat a.jpg", "pipe:"),
        ("a\0b.jpg", "cannot read image"),
        ("", "''"),
    ],
)
def test_list_images_bad_source_raises(
    source: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").touch()
    (tmp_path / "notes.txt").write_text("# nothing\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF-1.7")
    with zipfile.ZipFile(tmp_path / "hostile.zip", "w") as archive:
        archive.writestr("../a.jpg", b"")
    with pytest.raises(InputError, match=match):
        list_images([source])


def test_list_images_login_in_a_list_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://me:secret@example.com/a.jpg\n")
    with pytest.raises(ConfigError, match=r"login|password|credential") as caught:
        list_images([str(tmp_path / "list.txt")])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a/000000000139.jpg", "b/42.png"], [139, 42]),
        (["a/7.jpg", "b/7.jpg"], [1, 2]),
        (["a/7.jpg", "b/street.jpg"], [1, 2]),
        (["a/٣.jpg"], [1]),
        (["a/99999999999999999999.jpg"], [1]),
    ],
)
def test_number_images_by_name_only_if_all_differ(names: list[str], expected: list[int]) -> None:
    assert number_images([ImageSource(name) for name in names]) == expected

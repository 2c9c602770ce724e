"""`python -m jobs.show`: a page of samples as stored and as trained; wrong input writes nothing and exits 2."""

import re
from pathlib import Path

import pytest
from support.browser import foreign_addresses
from support.data import write_shards

from jobs.cli import main
from jobs.show import build_parser, run
from pipeline.data.index import ShardIndex


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(tmp_path_factory.mktemp("show"), images=8, samples_per_shard=5)


def show(*words: str) -> int:
    return main(build_parser(), run, list(words))


def test_show_page_has_each_image_stored_and_trained(index: ShardIndex, tmp_path: Path) -> None:
    out = tmp_path / "page"
    assert show(index.folder, "data.augment.preset=strong", "data.augment.scales=[64]", "--out", str(out)) == 0
    html = (out / "samples.html").read_text()
    assert foreign_addresses(html) == []
    assert html.count("<article") == 8
    assert len(re.findall(r"<figure", html)) == 8 * 3
    for image_id in index.samples.image_id.tolist():
        assert f"<h3>{image_id:012d}, " in html
        for what in ("as stored", "as trained in epoch 0", "as trained in epoch 1"):
            assert f"Image {image_id} {what}: " in html
    assert [shard.name in html for shard in index.shards] == [True, True]
    assert "1 kite, 2 person, 1 sign" in html  # with the box without area and the crowd region
    assert "strong, brightness 0.4" in html


def test_show_class_shows_images_with_this_class_only(index: ShardIndex, tmp_path: Path) -> None:
    words = ("--class", "kite", "--images", "3", "--epochs", "0", "--out", str(tmp_path))
    assert show(index.folder, *words) == 0
    html = (tmp_path / "samples.html").read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    assert len(titles) == 3
    assert all("1 kite" in title for title in titles)
    assert "as trained in epoch" not in html


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["SHARDS", "--class", "kitten"], "kite"),
        (["SHARDS", "data.augment.mosiac=1"], "data.augment.mosaic"),
        (["SHARDS", "data.augment.hue=0.7"], "data.augment.hue"),
        (["SHARDS", "--images", "0"], "--images"),
        (["SHARDS", "--config", "demmo"], "demo"),
        (["SHARDS", "--out", "SHARDS"], "choose another"),
        (["nowhere"], "jobs.shard build"),
    ],
)
def test_show_wrong_input_is_named_and_nothing_is_written(
    index: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    words = [index.folder if word == "SHARDS" else word for word in words]
    before = sorted(Path(index.folder).iterdir())
    assert show(*words, *([] if "--out" in words else ["--out", str(tmp_path / "out")])) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert sorted(Path(index.folder).iterdir()) == before

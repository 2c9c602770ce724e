"""The length of a run is the one that its loader gives."""

from pathlib import Path

import pytest

from pipeline.config import Config, override
from pipeline.data.index import load_index
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.launch.sizing.estimate import plan_loader
from pipeline.launch.sizing.steps import Length, length_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    annotations, images = write_synthetic(folder / "raw", images=14, seed=0, size=64)
    build_shards(annotations, images, folder / "shards")
    return folder / "shards"


@pytest.mark.parametrize(
    ("words", "length"),
    [
        ([], Length(14, 3, 150)),
        (["data.tail=wrap"], Length(14, 4, 200)),
        (["train.epochs=2", "train.max_steps=5"], Length(14, 3, 5)),
        (["train.epochs=2", "train.max_steps=7"], Length(14, 3, 6)),
        (["data.balance=1"], None),
    ],
)
def test_length_of_is_that_of_the_loader(shards: Path, words: list[str], length: Length | None) -> None:
    config = override(Config(), [f"data.train={shards}", "train.global_batch=4", *words])
    found = length_of(config, load_index(str(shards)))
    assert found.per_epoch == plan_loader(config).steps_per_epoch
    assert found == length if length else found.samples > 14

"""The table of presets: which there are, what is counted and measured, how it is printed."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.data import write_shards

from jobs.cli import main
from jobs.table import CONFIGS, build_parser, run
from pipeline.config import AugmentConfig
from pipeline.errors import ConfigError
from pipeline.model import build_model
from pipeline.presets.published import Published, find_published
from pipeline.presets.rows import (
    VAL_SIZES,
    Row,
    describe,
    evaluation_sizes,
    find_presets,
    images_per_second,
    select,
    sizes_of,
)
from pipeline.presets.table import HEADER, as_json, as_text
from pipeline.presets.trained import TrainedRun

PRESETS = find_presets(CONFIGS)
PUBLISHED = Published(table="1", row="DETR", epochs=500, ap=42.0, ap_code=42.1, params=41, gflops=86)
ROWS = [
    Row("detr", PUBLISHED, 41_300_000, 41_500_000, 86.2, 1.5, TrainedRun("mine", "id", 41.96)),
    Row("other", Published(), 1_000_000, 1_000_000, 0.5),
]


def test_find_presets_skips_base_files() -> None:
    assert "r50_deformable" in PRESETS
    assert [name for name in PRESETS if name.startswith("base")] == []
    with pytest.raises(ConfigError, match=str(CONFIGS.parent)):
        find_presets(CONFIGS.parent)


def test_find_presets_has_each_row_of_the_paper_once() -> None:
    rows = [(row.table, row.row, row.epochs) for row in map(find_published, PRESETS) if row.table]
    assert len(rows) == len(set(rows))
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), key=("1", "2", "3", "code").index)
    last = [name for name in PRESETS if find_published(name).table == "1"][-3:]
    assert last == ["r50_deformable", "r50_deformable_refine", "r50_deformable_two_stage"]


def test_select_by_name() -> None:
    assert select(PRESETS, []) == PRESETS
    assert list(select(PRESETS, ["demo", "r50_detr"])) == ["r50_detr", "demo"]
    with pytest.raises(ConfigError, match=r"\br50_det\b.*\br50_detr\b"):
        select(PRESETS, ["r50_det"])


def test_evaluation_sizes_are_resized() -> None:
    augment = AugmentConfig(eval_size=800, max_size=1333)
    assert evaluation_sizes({(480, 640): 2, (640, 480): 3, (240, 640): 1}, augment) == {(800, 1066): 5, (500, 1333): 1}
    assert sum(VAL_SIZES.values()) == 80


def test_sizes_of_shards_counts_images(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    sizes = sizes_of(index.folder)
    assert sum(sizes.values()) == len(index)
    assert sizes[48, 64] == 2  # of the helper's first size, once more after all seven


def test_describe_matches_the_model() -> None:
    config = PRESETS["r50_deformable_refine"]
    small, large = (describe("r50_deformable_refine", config, {size: 1}) for size in ((480, 480), (480, 640)))
    parameters = list(build_model(config.model, load_backbone=False).parameters())
    assert small.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert small.parameters == sum(p.numel() for p in parameters)
    assert small.trainable < small.parameters  # the stem is frozen
    assert small.published == find_published("r50_deformable_refine")
    assert 0 < small.gflops < large.gflops


def test_images_per_second_is_positive() -> None:
    assert images_per_second(PRESETS["demo"], 2, torch.device("cpu")) > 0


def test_as_text_and_markdown_have_the_same_cells() -> None:
    text, markdown = as_text(ROWS), as_text(ROWS, markdown=True)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()[:4]]
    assert table[0] == list(HEADER)
    assert table[1] == ["---"] * len(HEADER)
    assert table[2] == ["detr", "1: DETR", "500", "41.3 + 0.2", "41", "86.2", "86", "1.002", "1.50",
                        "42.0, 42.1 code", "42.0 (mine)"]  # fmt: skip
    assert table[3] == ["other", "-", "-", "1.0 + 0.0", "-", "0.5", "-", "-", "-", "-", "-"]
    lines = text.splitlines()
    for cells, line in zip((table[0], table[2], table[3]), lines[:3], strict=True):
        assert re.split(r" {2,}", line) == cells
    assert lines[1].index("86.2") == lines[2].index("0.5") == lines[0].index("GFLOPs")


def test_as_json_has_every_field() -> None:
    detr, other = json.loads(as_json(ROWS))
    assert detr["published"]["ap"] == 42.0
    assert detr["trained"] == {"name": "mine", "run_id": "id", "ap": 41.96}
    assert other["trained"] is other["fps"] is other["published"]["ap"] is None


def test_table_command_prints_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    assert main(build_parser(), run, ["demo", "--fps", "1", "--json", "-"]) == 0
    printed = capsys.readouterr()
    (row,) = json.loads(printed.out)
    assert row["preset"] == "demo"
    assert row["fps"] > 0
    assert "no trained runs" in printed.err
    assert main(build_parser(), run, ["demo", "--markdown", "--json", str(tmp_path / "rows.json")]) == 0
    assert capsys.readouterr().out.startswith("| preset |")
    again = json.loads((tmp_path / "rows.json").read_text())
    assert again == [row | {"fps": None}]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["r50_dter"], 2, "did you mean r50_detr?"),
        (["demo", "--val", "nowhere"], 2, "nowhere"),
        (["demo", "--val", ""], 2, "neither a folder nor a URL"),
        (["demo", "--fps", "-1"], 2, "--fps -1"),
        (["demo", "--tracking-uri", "sqlite:////nowhere/mlflow.db"], 2, "no MLflow database"),
        (["demo", "--tracking-uri", "ftp://x"], 2, "--tracking-uri"),
        (["demo", "--json", "/dev/null/rows.json"], 2, "cannot write /dev/null/rows.json"),
    ],
)
def test_table_command_bad_input_exits_2(
    arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////nowhere/mlflow.db")
    assert main(build_parser(), run, arguments) == code
    assert said in capsys.readouterr().err

"""`jobs.finetune` as a user runs it: killed in every stage it continues there; the commands of the tutorial work."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import mlflow
import pytest
from support.helpers import tiny_run
from support.paths import ROOT

from jobs.presets import find_config
from pipeline.config import load_config
from pipeline.data.importing.drawn_export import write_export
from pipeline.launch.finetune.stages import Stage
from pipeline.runs.evaluations import read_evaluations
from pipeline.runs.record import write_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
EXPORT = {"train": 24, "valid": 6, "test": 4}
SETTINGS = ("train.epochs=3", "train.global_batch=4", "train.micro_batch=2", "train.checkpoint_steps=3",
            "data.augment.scales=[96]", "data.augment.eval_size=96", "scaling.num_workers=1")  # fmt: skip
SMALL = ("model.hidden_dim=32", "model.heads=4", "model.ffn_dim=32", "model.queries=10", "model.backbone.width=8")
SHOWN = re.compile(r"(\d) of \d: ")
DOCUMENT = ROOT / "docs" / "own_data.md"


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}


def run_until(folder: Path, words: Sequence[str], stage: int | None) -> tuple[list[int], str]:
    """Run the command in `folder` and kill it with all its children when it comes to a stage; None lets it end.

    Returns:
        The stages that it came to, and what it printed.
    """
    command = [sys.executable, "-m", "jobs.finetune", *words]
    seen: list[int] = []
    said: list[str] = []
    with (folder / "out.txt").open("w") as out, subprocess.Popen(
        command, cwd=folder, env=environment(folder), stdout=out, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr
        for line in process.stderr:
            said.append(line)
            if found := SHOWN.search(line):
                seen.append(int(found[1]))
            training = stage == 3 and "evaluated: AP" in line  # in the midst of it, with a checkpoint
            if training or (stage not in (None, 3) and seen and seen[-1] == stage):
                os.killpg(process.pid, signal.SIGKILL)
                break
        code = process.wait()
    assert code == (0 if stage is None else -signal.SIGKILL), "".join(said)[-3000:]
    return seen, (folder / "out.txt").read_text()


@pytest.mark.timeout(1800)
def test_finetune_killed_in_every_stage_continues_there_and_ends_as_if_it_was_not(tmp_path: Path) -> None:
    ends = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_export(folder / "export.zip", EXPORT, 128)
        words = ["export.zip", "name=cells", *SETTINGS, *SMALL]
        came_to = []
        for stage in range(1, len(Stage) + 1) if name == "killed" else ():
            seen, _ = run_until(folder, words, stage)
            came_to.append(seen)
        seen, said = run_until(folder, words, None)
        if name == "killed":
            assert came_to == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7]]
            assert seen == [7]
        else:
            assert seen == [1, 2, 3, 4, 5, 6, 7]
        assert "python -m jobs.predict models:/cells@challenger" in said
        run = folder / "runs/cells"
        assert (run / "analysis").is_dir()
        assert list((run / "detections").glob("*.png"))
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        assert len(client.search_model_versions("name='cells'")) == 1
        test = json.loads((run / "test.json").read_text())["metrics"]
        ends[name] = [row.entry for row in read_evaluations(str(run))], test
        again, _ = run_until(folder, words, None)
        assert again == []  # everything is done
    assert ends["killed"] == ends["whole"]


def commands() -> list[list[str]]:
    """The commands of the tutorial in their order; of `--dry-run` and `--probe` as well."""
    found = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = [line for block in found for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.timeout(1800)
def test_commands_of_the_tutorial_work_one_after_another(tmp_path: Path) -> None:
    write_export(tmp_path / "export.zip", EXPORT, 128)
    with zipfile.ZipFile(tmp_path / "export.zip") as archive:
        name = next(each for each in archive.namelist() if each.endswith(".jpg"))
        (tmp_path / "image.jpg").write_bytes(archive.read(name))
    preset = load_config(find_config("finetune_small"), ["model.num_classes=5", "train.micro_batch=4"])
    write_run(tiny_run(tmp_path / "runs/demo", preset))  # what `make demo` leaves, untrained
    done = []
    for words in commands():
        assert words[:2] == ["python", "-m"]
        quick = [] if words[2] not in ("jobs.finetune", "jobs.train") else ["train.max_steps=2"]
        if "finetune_r50" in words or "jobs/configs/r50_deformable.yaml" in words:
            quick += ["model.backbone.weights=none", "--dry-run"]  # no download, and no hours
        if "jobs/configs/r50_deformable.yaml" in words:
            quick += ["train.global_batch=8"]  # 32 images are more than there are here
        result = subprocess.run(
            [sys.executable, *words[1:], *quick], cwd=tmp_path, env=environment(tmp_path), text=True,
            capture_output=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stderr[-3000:]}"
        done.append(words[2])
    assert {"jobs.finetune", "jobs.weights", "jobs.lint", "jobs.shard", "jobs.train", "jobs.evaluate"} <= set(done)
    assert (tmp_path / "runs/mine/run.json").is_file()

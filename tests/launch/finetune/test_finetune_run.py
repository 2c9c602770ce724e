"""What is refused before anything is written, what a project remembers, and how a name is made. No Ray."""

import json
import os
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.data import edit, with_orientation
from support.helpers import tiny_checkpoint, tiny_run
from support.layouts import draw_truth, write_roboflow_yolo
from support.paths import ROOT

from jobs import finetune
from jobs.cli import main
from jobs.dataset_arguments import lint_words, read_options
from pipeline.data.importing.drawn_export import ANNOTATIONS, write_export
from pipeline.errors import ConfigError, RunError
from pipeline.files import folder_lock
from pipeline.files.folder_lock import FILE as LOCK
from pipeline.files.folder_lock import FolderLock
from pipeline.launch import driver
from pipeline.launch.finetune import results
from pipeline.launch.finetune import run as module
from pipeline.launch.finetune.choice import Machine
from pipeline.launch.finetune.project import FILE, read_project, write_project
from pipeline.launch.finetune.run import Finetuning, Request, name_of
from pipeline.launch.finetune.stages import AFTER_TRAINING, Stage, next_stage
from pipeline.launch.preflight import make_paths_absolute
from pipeline.launch.sizing.auto import with_numbers
from pipeline.runs.record import read_run, write_run


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("drawn") / "My cells (1).zip", {"train": 8, "valid": 2, "test": 1}, 96)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", 0.0)  # a second at each start


def say(*words: object) -> int:
    return main(finetune.build_parser(), finetune.run, [str(word) for word in words])


def begin(export: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    """Run all stages up to the training, which is left out."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_run", stop)
    assert say(export, "name=cells", *words) == 130
    return Path("runs/cells")


def test_page_of_the_documents_has_the_stages_and_what_may_be_longer() -> None:
    page = (ROOT / "docs/own_data.md").read_text()
    (rule,) = re.findall(r"Only a larger (.*?)\s+continues it\.", page, re.DOTALL)
    assert set(re.findall(r"`(.*?)`", rule)) == set(module.LONGER)
    names = [name.lower() for name in re.findall(r"^\| (.*?) \|", page.partition("| Stage |")[2], re.MULTILINE)]
    assert names[: len(Stage)] == [stage.value for stage in Stage]


def test_data_set_whose_orientation_is_undecided_is_accepted_with_the_flag_that_the_message_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_roboflow_yolo(draw_truth({"train": 6, "val": 2}), tmp_path / "export")
    photo = tmp_path / "export/train/images/pic 001.jpg"
    photo.write_bytes(with_orientation(Image.open(photo), 3))
    assert say("export", "name=photos", "--dry-run") == 2
    assert "give --exif apply or --exif ignore" in capsys.readouterr().err
    assert say("export", "name=photos", "--exif", "apply", "--dry-run") == 0
    assert "rotated when read, as their boxes are" in capsys.readouterr().out


def test_name_of_a_data_set_is_a_valid_name() -> None:
    assert name_of("/data/My cells (1).zip") == "My-cells--1-.zip"  # no file here, so it may be a folder
    assert name_of("..") != ""
    assert name_of("/") == "finetune"


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.train=x"], "data.train"),
        (["optim.lrr=1"], "optim.lr"),
        (["model.num_classes=7"], "auto"),
        (["--preset", "r50_deformable"], "auto"),
        (["model.init_from=models:/cells@challenger"], "the folder of the run"),
        (["model.init_from=nowhere"], "nowhere"),
        (["storage=s3://bucket/runs"], "storage"),
        (["--preset", "finetune_smal"], "finetune_small"),
        (["--split", "0.9"], "--split"),
        (["--classes", "dog"], "dog"),
        (["train.patience=0"], "train.patience"),
    ],
)
def test_finetune_refuses_wrong_input_and_writes_nothing(
    export: Path, words: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(export, *words) == 2
    assert key in capsys.readouterr().err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("bare", "splits", "words", "said"),
    [
        ("train", {"train": 3, "valid": 2}, (), "no box in train"),
        ("valid", {"train": 3, "valid": 2}, (), "no box in val"),
        ("", {"train": 3}, (), "none of its 3 images for train"),
        ("", {"train": 12}, ("--split", "0"), "give another --split"),
        ("", {"train": 12}, ("--split", "0.49"), "smaller share"),
        ("", {"valid": 3, "test": 1}, (), "name a split train"),
    ],
)
def test_finetune_refuses_splits_that_nothing_can_be_learned_from_or_measured_on(
    tmp_path: Path,
    bare: str,
    splits: dict[str, int],
    words: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with zipfile.ZipFile(write_export(tmp_path / "drawn.zip", splits, 96)) as archive:
        archive.extractall(tmp_path / "drawn")
    if bare:
        edit(tmp_path / "drawn" / bare / ANNOTATIONS, {"annotations": []})
    assert say("drawn", "--dry-run", *words) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


def test_made_split_without_a_box_says_how_it_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(write_export(tmp_path / "drawn.zip", {"train": 12}, 96)) as archive:
        archive.extractall(tmp_path / "drawn")
    annotations = tmp_path / "drawn/train" / ANNOTATIONS
    edit(annotations, {"annotations": json.loads(annotations.read_text())["annotations"][:1]})
    assert say("drawn", "--dry-run") == 2
    said = capsys.readouterr().err
    assert "no box in val" in said
    assert "it was taken from train, where too few images have boxes" in said


def test_finetune_refuses_a_data_set_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert say("nothing.zip") == 2
    assert "nothing.zip" in capsys.readouterr().err


def test_dry_run_prints_the_settings_and_writes_nothing(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert say(export, "--dry-run", "optim.lr=3e-4") == 0
    said = capsys.readouterr().out
    assert "lr: 0.0003" in said
    assert Stage.SHARDS.value in said
    assert list(Path().iterdir()) == []


def test_finetune_refuses_a_run_of_that_name_that_it_did_not_make(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/cells").mkdir(parents=True)
    Path("runs/cells/run.json").write_text("{}")
    assert say(export, "name=cells") == 2
    assert FILE in capsys.readouterr().err


def test_finetune_builds_every_split_and_continues_after_it(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(export, monkeypatch)
    project = read_project(folder)
    assert project is not None
    assert project.splits == ("train", "val", "test")
    assert project.has_shards(folder)
    shutil.rmtree(folder / "data/val")  # as after a kill in the build
    assert not project.has_shards(folder)
    begin(export, monkeypatch)
    assert project.has_shards(folder)


def test_finetune_beside_another_one_exits_2_and_names_its_process(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every stage, also before there is a run."""
    with FolderLock(str(Path("runs/cells").absolute()), print):
        assert say(export, "name=cells") == 2
        said = capsys.readouterr().err
        assert f"process {os.getpid()} on" in said
        assert said.endswith("then run the same command again\n")
        assert [path.name for path in Path("runs/cells").iterdir()] == [LOCK]
    assert not Path("runs").exists()


def test_finetune_after_another_one_has_changed_the_folder_meanwhile_is_refused(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = module.fingerprint_of

    def rival(dataset: str) -> Any:
        monkeypatch.setattr(module, "fingerprint_of", fingerprint)
        begin(export, monkeypatch)  # a whole start, after this one has read that there is no project
        return fingerprint(dataset)

    monkeypatch.setattr(module, "fingerprint_of", rival)
    assert say(export, "name=cells") == 2
    assert "a moment ago" in capsys.readouterr().err


def test_finetune_refuses_another_data_set_or_other_flags(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.zip"
    shutil.copy(export, copy)
    begin(copy, monkeypatch)
    capsys.readouterr()
    assert say(copy, "name=cells", "--exclude", "platelet") == 2
    assert "--exclude" in capsys.readouterr().err
    moved = tmp_path / "moved.zip"
    copy.rename(moved)
    begin(moved, monkeypatch)  # the same files under another name are the same data set
    write_export(moved, {"train": 8, "valid": 2, "test": 1}, 96, seed=1)
    assert say(moved, "name=cells") == 2
    assert "changed" in (said := capsys.readouterr().err)
    assert "a file has other bytes" in said
    write_export(moved, {"train": 9, "valid": 2, "test": 1}, 96)
    assert say(moved, "name=cells") == 2
    assert re.search(r"changed .* \((\d+) files then, (?!\1)\d+ now\)", capsys.readouterr().err)


def test_storage_that_is_a_file_is_refused_and_nothing_is_advised_to_be_removed(
    export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("")
    assert say(export, "storage=taken") == 2
    said = capsys.readouterr().err
    assert "set storage to a folder" in said
    assert "remove" not in said


def test_project_is_read_as_it_was_written(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begin(export, monkeypatch)
    project = read_project(folder)
    assert project is not None
    done = replace(project.with_done(Stage.TEST, "checkpoint_1"), preset="p")
    write_project(tmp_path / "other", done)
    assert read_project(tmp_path / "other") == done
    assert json.loads((tmp_path / "other" / FILE).read_text())["done"] == {"TEST": "checkpoint_1"}


def test_finetune_checks_the_weights_to_start_from_before_it_builds(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tiny_checkpoint(tmp_path / "weights")
    assert say(export, "name=cells", f"model.init_from={weights}") == 2
    assert "model.init_from" in capsys.readouterr().err
    assert not Path("runs").exists()


def finetuning(export: Path, *given: str) -> Finetuning:
    """What a start of the command finds on disk."""
    args = finetune.build_parser().parse_args([str(export)])
    args.split = finetune.SHARE
    words = lint_words(args)
    flags = shlex.join(words[4:])
    return Finetuning(
        Request(str(export), read_options(args), flags, tuple(words), "", ("name=cells", *given), finetune.load),
        Machine(2, 0, 0.0),
    )


@pytest.fixture
def finished(export: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has just finished its training, with a checkpoint of the numbers that `auto` became."""
    folder = begin(export, monkeypatch)
    config = make_paths_absolute(with_numbers(finetuning(export).config(), 3, 2))
    evaluation = config.evaluation.model_copy(update={"where": "inline"})
    scaling = config.scaling.model_copy(update={"use_gpu": False})
    record = tiny_run(folder.absolute(), config.model_copy(update={"evaluation": evaluation, "scaling": scaling}))
    write_run(record)
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), Stage.TEST),
        (("model.num_classes=auto", "train.micro_batch=auto"), Stage.TEST),
        (("scaling.num_workers=1", "scaling.use_gpu=auto", "evaluation.where=auto"), Stage.TEST),
        (("train.epochs=150",), Stage.TRAINING),
        (("train.epochs=150", "optim.lr=1e-5"), Stage.TRAINING),
        (("train.patience=null",), Stage.TRAINING),
    ],
)
def test_finished_training_is_repeated_only_for_settings_that_change_numbers(
    finished: Path, export: Path, given: tuple[str, ...], expected: Stage
) -> None:
    assert next_stage(finetuning(export, *given).facts()) is expected


@pytest.mark.parametrize(
    "given", ["optim.lr=1e-05", "data.balance=0.1", "model.init_from=nowhere", "train.epochs=1", "train.max_minutes=9"]
)
def test_finished_training_refuses_settings_that_come_too_late(finished: Path, export: Path, given: str) -> None:
    before = (finished / "run.json").read_bytes()
    with pytest.raises(RunError, match=f"{given.replace('=', ' was .*, is .*')}.*new name="):
        finetuning(export, given)
    assert (finished / "run.json").read_bytes() == before


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_signal_after_the_last_step_of_the_training_ends_the_command(
    finished: Path, export: Path, signal: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    record = read_run(str(finished))
    monkeypatch.setattr(module, "check_run", lambda *_: None)
    monkeypatch.setattr(driver, "train", lambda *_, **__: driver.stop_after_end(record, [signal]))
    monkeypatch.setattr(results, "DO", {})  # a stage after the training would be a KeyError
    assert say(export, "name=cells", "train.epochs=150") == code
    assert "the same command continues" in capsys.readouterr().err


def test_another_name_or_alias_is_registered_again(
    finished: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Stage] = []
    fake = {stage: lambda record, config, stage=stage: done.append(stage) for stage in AFTER_TRAINING}
    monkeypatch.setattr(results, "DO", fake)
    finetuning(export).run()
    done.clear()
    for given in ("tracking.register_as=other", "tracking.alias=candidate"):
        assert "REGISTRATION" in str(next_stage(finetuning(export, given).facts()))
    said = str(finetuning(export, "tracking.register_as=other").run())
    assert done == [Stage.REGISTRATION]
    assert "models:/other@challenger" in said


def test_outcome_shows_no_number_of_a_test_split_without_objects(finished: Path, export: Path) -> None:
    (finished / results.NUMBERS).write_text('{"metrics": {"AP": -1, "AP50": -1}, "classes": ""}')
    said = str(results.outcome(read_run(str(finished)), finetuning(export).config()))
    assert "test        AP -  AP50 -\n" in said


def test_finetune_checks_settings_against_the_preset_of_the_machine(export: Path) -> None:
    given = ("name=cells", "model.freeze=[backbone]", "train.micro_batch=16")
    args = finetune.build_parser().parse_args([str(export)])
    request = Request(str(export), read_options(args), "", (), "", given, finetune.load)
    assert Finetuning(request, Machine(8, 1, 80.0)).folder.name == "cells"
    with pytest.raises(ConfigError, match="init_from"):  # the small model has no trained backbone
        Finetuning(request, Machine(8, 0, 0.0))


def test_finetune_refuses_a_run_inside_of_its_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cells").mkdir()
    monkeypatch.chdir(tmp_path / "cells")
    assert say(".") == 2
    assert "storage" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_stage_that_leaves_nothing_ends_the_command(
    finished: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = finetuning(export)
    monkeypatch.setattr(work, "_do", lambda stage: None)
    with pytest.raises(RunError, match=Stage.TEST.value):
        work.run()


def test_stages_after_the_training_are_remembered_by_their_checkpoint(
    finished: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Stage] = []
    fake = {stage: lambda record, config, stage=stage: done.append(stage) for stage in AFTER_TRAINING}
    monkeypatch.setattr(results, "DO", fake)
    said = str(finetuning(export).run())
    assert done == list(AFTER_TRAINING)
    assert "models:/cells@challenger" in said
    finetuning(export).run()
    assert done == list(AFTER_TRAINING)

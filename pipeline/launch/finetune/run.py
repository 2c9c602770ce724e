"""Runs the stages of a fine-tuning one after another, from whatever is already done.

Wrong input is an InputError, and nothing is written before the data set and the settings were accepted. Each stage's
own errors are those of the command that does it alone; the same command continues.
"""

import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config, dump_yaml, flatten, from_record, override
from pipeline.data.importing.build import build_dataset, refuse_dataset
from pipeline.data.importing.dataset import TEST, TRAIN, VAL, DatasetSplit, Options, read_dataset
from pipeline.errors import AnnotationError, ConfigError, RunError
from pipeline.files.storage import is_url, make_absolute
from pipeline.launch.finetune import results
from pipeline.launch.finetune.choice import Machine, choose, preset_for
from pipeline.launch.finetune.project import (
    DATA,
    Project,
    check_same_data,
    fingerprint_of,
    read_project,
    write_project,
)
from pipeline.launch.finetune.stages import AFTER_TRAINING, Facts, Stage, next_stage
from pipeline.launch.preflight import check_run, count_parameters, make_paths_absolute
from pipeline.launch.run_lock import HeldRun, hold_run
from pipeline.launch.sizing.auto import with_numbers, with_recorded
from pipeline.logs import get_logger
from pipeline.runs.record import RunRecord, read_run, run_exists

log = get_logger("finetune")
PLACE = ("name", "storage")
OWN_KEYS = ("data.train", "data.val")  # follow from the data set
LONGER = ("train.epochs", "train.max_steps", "train.patience", "train.max_minutes")  # may continue a finished run
NEUTRAL = ("tracking.", "scaling.", "evaluation.where", "evaluation.task_minutes", "storage")  # they change no number


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    dataset: str
    options: Options
    flags: str  # that say how it is read and with which preset, for the record
    lint: tuple[str, ...]  # words of the command that shows all findings
    preset: str  # of the user; empty to choose
    given: tuple[str, ...]  # key=value
    load: Callable[[str, Sequence[str]], Config]  # a preset by name, with settings over it


class Finetuning:
    """A request and what is on disk of it.

    Args:
        request: of the user.
        machine: to choose settings for.

    Raises:
        InputError: settings that do not load, a folder that holds something else, another data set than before, or
            settings that come after the training's end.
    """

    def __init__(self, request: Request, machine: Machine) -> None:
        self._request, self._machine = request, machine
        keys = [text.partition("=")[0] for text in request.given]
        if own := [key for key in OWN_KEYS if key in keys]:
            raise ConfigError(f"{', '.join(own)}: jobs.finetune makes the shards of DATASET itself; leave it out")
        self._names = () if "name" in keys else (f"name={name_of(request.dataset)}",)
        place = [text for text in request.given if text.startswith(tuple(f"{key}=" for key in PLACE))]
        config = request.load(request.preset or preset_for(machine), [*self._names, *place])
        if is_url(config.storage):
            raise ConfigError(
                f"storage={config.storage}: jobs.finetune needs a local folder; use jobs.shard, jobs.train"
            )
        self.folder = Path(make_absolute(config.storage)) / config.name
        if Path(os.path.realpath(request.dataset)) in Path(os.path.realpath(self.folder)).parents:
            raise ConfigError(
                f"storage={config.storage} is inside the data set {request.dataset}, which would then change; set "
                "storage to a folder beside it"
            )
        self._trained = False  # in this process
        self.project = read_project(self.folder)
        if self.project:  # wrong settings are said before the data set is read
            self.config()
            self._refuse_late_settings()
        else:
            self._load(request.preset or preset_for(machine), ())
        self._fingerprint = fingerprint_of(request.dataset)
        if self.project:
            check_same_data(self.project, self.folder, request.dataset, self._fingerprint, request.flags)

    def facts(self) -> Facts:
        """What is done."""
        project = self.project
        if project is None:
            return Facts()
        if not run_exists(str(self.folder)):
            return Facts(True, project.has_shards(self.folder), has_test=TEST in project.splits)
        record = read_run(str(self.folder))
        best = (record.best or record.last or "").rpartition("/")[2]
        done = tuple(
            (stage, best) for stage in AFTER_TRAINING if project.done.get(stage.name) == self._mark(stage, best)
        )
        trained = record.status == "FINISHED" and (self._trained or not self._changes(record))
        return Facts(True, project.has_shards(self.folder), trained, best, done, TEST in project.splits)

    def run(self) -> results.Outcome:
        """Do all stages that are not done.

        Raises:
            RunError: another process is at work in the folder, or something else changes it: a stage has ended and its
                output is not there.
            LostRunError: another process has taken over the folder.
            PreemptedError: the training was asked to stop.
            KeyboardInterrupt: Ctrl-C.
        """
        with hold_run(str(self.folder), "auto") as held:
            if read_project(self.folder) != self.project:
                raise RunError(f"{self.folder} was changed by another process a moment ago; run the same command again")
            return self._run(held)

    def _run(self, held: HeldRun) -> results.Outcome:
        before = None
        while (stage := next_stage(self.facts())) is not None:
            if stage is before:
                raise RunError(f"{self.folder} has changed while `{stage.value}` ran; is another process using it?")
            log.info("%d of %d: %s", list(Stage).index(stage) + 1, len(Stage), stage.value)
            self._do(stage)
            held.check()
            before = stage
        assert self.project is not None, "the first stage makes it"
        return results.outcome(read_run(str(self.folder)), self.config())

    def describe(self) -> str:
        """The config and what is next, for `--dry-run`; the project must have been accepted."""
        stage = next_stage(self.facts())
        ahead = "everything is done" if stage is None else f"next: {stage.value}"
        return f"{dump_yaml(self.config())}\n{self.folder}: {ahead}"

    def accept(self) -> Project:
        """Check the data set and choose the settings; nothing is written.

        Raises:
            AnnotationError: a build would refuse the data set, or it has no images to train or to evaluate on.
            InputError: the settings do not fit, or the weights to start from cannot be read.
        """
        request = self._request
        found = read_dataset(request.dataset, request.options, decode=True)
        for line in found.findings.table():
            print(line)
        log.info("%s", found.describe())
        refuse_dataset(request.dataset, found, shlex.join(request.lint))
        splits = {split.name: split for split in found.splits}
        _check_splits(request.dataset, splits, found.made)
        chosen = choose(len(splits[TRAIN].samples), self._machine, request.preset)
        log.info("preset %s with %s, for %s", chosen.preset, " ".join(chosen.settings), chosen.reason)
        config = self._load(chosen.preset, chosen.settings)
        classes = len(splits[TRAIN].source.categories)
        if (given := config.model.num_classes) not in ("auto", classes):
            raise ConfigError(f"model.num_classes={given}, but the data set has {classes} classes; set it to auto")
        count_parameters(make_paths_absolute(with_numbers(config, classes, 1)), load=True)
        return Project(
            os.path.abspath(request.dataset),
            self._fingerprint.digest,
            request.flags,
            chosen.preset,
            chosen.settings,
            tuple(splits),
            done={},
            files=self._fingerprint.files,
        )

    def config(self) -> Config:
        """The whole config of the training: the preset, what was chosen, what the user gives."""
        assert self.project is not None, "it was accepted"
        data = self.folder / DATA
        paths = (f"data.train={data / TRAIN}", f"data.val={data / VAL}")
        return self._load(self.project.preset, (*self.project.settings, *paths))

    def _load(self, preset: str, settings: Sequence[str]) -> Config:
        return self._request.load(preset, [*self._names, *settings, *self._request.given])

    def _changes(self, record: RunRecord) -> dict[str, tuple[Any, Any]]:
        """The settings given now that change numbers and differ from those of the run: key -> (recorded, given)."""
        recorded = from_record(record.config, record.folder)
        now = make_paths_absolute(with_recorded(override(recorded, list(self._request.given)), recorded))
        before, after = flatten(recorded), flatten(now)
        differing = [key for key in after if before[key] != after[key] and not key.startswith(NEUTRAL)]
        return {key: (before[key], after[key]) for key in differing}

    def _refuse_late_settings(self) -> None:
        """Refuse settings for a training that has ended, unless they let it continue. Raises RunError."""
        record = read_run(str(self.folder)) if run_exists(str(self.folder)) else None
        if record is None or record.status != "FINISHED":
            return
        changes = self._changes(record)
        if changes and not any(_is_longer(*changes[key]) for key in LONGER if key in changes):
            listed = ", ".join(f"{key} was {before}, is {after}" for key, (before, after) in changes.items())
            raise RunError(
                f"{self.folder} has finished its training, so other settings come too late: {listed}; give the old "
                f"values, or a new name= (model.init_from={self.folder} starts from what was learned)"
            )

    def _mark(self, stage: Stage, checkpoint: str) -> str:
        """What a stage was done for: a checkpoint, and the name and alias that it was registered under."""
        if stage is not Stage.REGISTRATION:
            return checkpoint
        config = self.config()
        return f"{checkpoint} as {results.registered_name(config)}@{config.tracking.alias}"

    def _do(self, stage: Stage) -> None:
        request, folder = self._request, self.folder
        if stage is Stage.LINT:
            self.project = self.accept()
            write_project(folder, self.project)
            return
        if stage is Stage.SHARDS:
            build_dataset(request.dataset, folder / DATA, request.options, command=request.lint)
            return
        if stage is Stage.TRAINING:
            config = self.config()
            checked = check_run(config, "auto")  # before Ray, whose import takes seconds
            from pipeline.launch.driver import train

            train(config, resume="auto", checked=checked)
            self._trained = True
            return
        assert self.project is not None, "it was accepted"
        record = read_run(str(folder))
        results.DO[stage](record, self.config())
        self.project = self.project.with_done(stage, self._mark(stage, record.checkpoint.rpartition("/")[2]))
        write_project(folder, self.project)


def _is_longer(before: float | None, after: float | None) -> bool:
    """Whether a limit of a training was raised or taken away."""
    return before is not None and (after is None or after > before)


def _check_splits(dataset: str, splits: Mapping[str, DatasetSplit], made: Collection[str]) -> None:
    """Refuse a data set that a training could not learn from, or not be measured on. Raises AnnotationError."""
    if TRAIN not in splits and made:
        raise AnnotationError(f"--split leaves no image of {dataset} for train; give a smaller share")
    if TRAIN not in splits:
        raise AnnotationError(f"{dataset} has no images for train, only for {', '.join(splits)}; name a split train")
    if VAL not in splits:
        count = len(splits[TRAIN].samples)
        raise AnnotationError(
            f"{dataset} has no images for val, and none of its {count:,} images for train became one; add images, or "
            "give another --split"
        )
    if not splits[TRAIN].used:
        raise AnnotationError(f"{dataset} has no box in train, so there is nothing to learn; label images of train")
    if not splits[VAL].used:
        way = "label images of val, or leave its files out: then some of train become val"
        if VAL in made:
            way = "it was taken from train, where too few images have boxes: label more, or give another --split"
        raise AnnotationError(f"{dataset} has no box in val, so no AP can be measured; {way}")


def name_of(dataset: str) -> str:
    """A run's name from that of a folder or archive."""
    stem = Path(os.path.abspath(dataset)).name
    stem = stem.rsplit(".", 1)[0] if os.path.isfile(dataset) else stem
    name = "".join(each if each.isascii() and (each.isalnum() or each in "._-") else "-" for each in stem)
    return name.strip("._-")[:100] or "finetune"

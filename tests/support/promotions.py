"""Registered versions of small detectors in a store of their own, and evaluations whose results are planted."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline.checkpoint import STATE, load, save
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.evaluation.coco import ground_truth
from pipeline.evaluation.detections import Detections
from pipeline.launch.evaluation_request import EvaluationRequest
from pipeline.registry.register import register
from pipeline.runs.record import RunRecord
from pipeline.tracking.client import connect
from support.detection_sets import Row, detections_of
from support.inference import small_run

NAME = "mine"


@dataclass
class Registry:
    """Versions of `NAME` over the shards `folder/val`, and those of `folder/other`, which are other images."""

    folder: Path
    versions: dict[str, str] = field(default_factory=dict)  # number by the name of its run
    states: dict[str, str] = field(default_factory=dict)  # sha256 of a version's state -> its run

    @property
    def uri(self) -> str:
        """Of the store."""
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def client(self) -> Any:
        """Of MLflow."""
        return connect(self.uri)

    @property
    def aliases(self) -> dict[str, str]:
        """The run of the version behind each alias."""
        names = {number: name for name, number in self.versions.items()}
        return {key: names[str(number)] for key, number in self.client.get_registered_model(NAME).aliases.items()}

    def add(self, name: str, *, seed: int = 0, val: str = "val", classes: Mapping[int, str] | None = None) -> RunRecord:
        """Register a run with random weights, validated on the shards `folder/val`.

        Args:
            name: of the run.
            seed: of the weights.
            val: folder of its validation shards.
            classes: names by category id that differ from those of the shards.
        """
        record = small_run(self.folder, name, seed)
        saved = load(record.checkpoint)
        config = {**saved.state.config, "data": {**saved.state.config["data"], "val": str(self.folder / val)}}
        categories = tuple(
            replace(each, name=(classes or {}).get(each.id, each.name)) for each in saved.state.categories
        )
        shutil.rmtree(record.checkpoint)
        save(Path(record.checkpoint), replace(saved.state, config=config, categories=categories), saved.weights, {})
        self.versions[name] = register(record, NAME, "")
        self.states[hashlib.sha256((Path(record.checkpoint) / STATE).read_bytes()).hexdigest()] = name
        return record

    def files_of(self, name: str) -> Path:
        """The checkpoint folder of the version of a run, in the store."""
        source = self.client.get_model_version_download_uri(NAME, self.versions[name])
        return Path(source.removeprefix("file://")) / "artifacts" / "checkpoint"

    def artifacts_of(self, name: str) -> Path:
        """The artifacts of a run, in the store."""
        run = self.client.get_model_version(NAME, self.versions[name]).run_id
        return Path(self.client.get_run(run).info.artifact_uri.removeprefix("file://"))

    def tags_of(self, name: str) -> dict[str, str]:
        """The tags that promotions gave to the version of a run, without their prefix."""
        tags = self.client.get_model_version(NAME, self.versions[name]).tags
        return {key.removeprefix("promotion/"): value for key, value in tags.items() if key.startswith("promotion/")}

    def reset(self, **aliases: str) -> None:
        """Only these aliases, and nothing of earlier promotions."""
        client = self.client
        model = client.get_registered_model(NAME)
        for alias in model.aliases:
            client.delete_registered_model_alias(NAME, alias)
        for key in model.tags:
            client.delete_registered_model_tag(NAME, key)
        for name, number in self.versions.items():
            for key in self.tags_of(name):
                client.delete_model_version_tag(NAME, number, f"promotion/{key}")
            shutil.rmtree(self.artifacts_of(name) / "promotion", ignore_errors=True)
        for alias, name in aliases.items():
            client.set_registered_model_alias(NAME, alias, self.versions[name])


def open_registry(folder: Path) -> Registry:
    """A store without versions, and the shards `folder/val` and `folder/other`."""
    for name, seed in (("val", 8), ("other", 9)):
        build_shards(*write_synthetic(folder / f"drawn-{name}", images=6, seed=seed), folder / name)
    connect(f"sqlite:///{folder}/mlflow.db", create=True)
    return Registry(folder)


@dataclass
class PlantedEvaluations:
    """Stands for `evaluate_model`: finds a share of the objects, by the run of the version."""

    registry: Registry
    shares: dict[str, float]
    calls: list[str] = field(default_factory=list)  # runs that were evaluated

    def __call__(self, request: EvaluationRequest) -> Any:
        """The result of an evaluation."""
        name = self.registry.states[hashlib.sha256((Path(request.model) / STATE).read_bytes()).hexdigest()]
        self.calls.append(name)
        given = dict(text.split("=", 1) for text in request.overrides)
        found = planted_detections(given["data.val"], self.shares[name])
        return SimpleNamespace(result=SimpleNamespace(detections=found, metrics={"AP": self.shares[name]}))


def planted_detections(shards: str, share: float) -> Detections:
    """The first `share` of the objects of each class, and a wrong box in each image."""
    truth = ground_truth(shards)
    rows: list[Row] = [(image["id"], truth["categories"][0]["id"], (0, 0, 1, 1), 0.1) for image in truth["images"]]
    objects = [each for each in truth["annotations"] if not each["iscrowd"]]
    for category in truth["categories"]:
        own = [each for each in objects if each["category_id"] == category["id"]]
        kept = own[: int(np.ceil(share * len(own)))]
        rows += [(each["image_id"], each["category_id"], tuple(each["bbox"]), 0.9) for each in kept]
    return detections_of(sorted(rows, key=lambda row: (row[0], -row[3])))

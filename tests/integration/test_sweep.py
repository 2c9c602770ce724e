"""A real sweep: Ray Tune over whole Ray Train runs, one MLflow run with a child per trial, a config to train."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml

from pipeline.config import load_config
from pipeline.data.shards import build_shards
from pipeline.data.synthetic import write_synthetic
from pipeline.runs import read_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SPACE = {
    "config": str(ROOT / "jobs/configs/demo.yaml"),
    "overrides": {
        "name": "sweep",
        "data.train": "shards",
        "data.val": "shards",
        "train.epochs": 5,
        "train.eval_epochs": 1,
        "model.enc_layers": 1,
        "model.dec_layers": 1,
        "model.hidden_dim": 32,
        "model.backbone.width": 8,
        "scaling.num_workers": 1,
        "scaling.cpus_per_worker": os.cpu_count(),  # one trial fills the machine: the next needs all of it back
    },
    # One query finds less than fifty, whatever they learned, so the second trial is stopped after its first epoch.
    "search": {"method": "asha", "samples": 1, "reduction": 2, "metric": "val/AR100"},
    "space": {"model.queries": {"grid": [50, 1, 49]}, "model.enc_points, model.dec_points": {"choice": [2]}},
}


def test_sweep(tmp_path: Path) -> None:
    annotations, images = write_synthetic(tmp_path / "raw", images=16, seed=0, size=96)
    build_shards(annotations, images, tmp_path / "shards")
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tune.sweep", "space.yaml"],
        cwd=tmp_path,  # relative paths mean this folder, in every trial and worker too
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    records = {}
    for path in (tmp_path / "runs/sweep").glob("sweep-*/run.json"):
        record = read_run(str(path.parent))
        records[record.config["model"]["queries"]] = record
    assert {queries: record.status for queries, record in records.items()} == {
        50: "FINISHED",
        1: "KILLED",
        49: "FINISHED",
    }
    assert records[50].config["model"]["enc_points"] == records[50].config["model"]["dec_points"] == 2

    best = load_config(tmp_path / "runs/sweep/best.yaml")
    assert best.model.queries in (50, 49)
    assert (best.name, best.data.train, best.tracking.register_as) == (
        "sweep-best",
        str(tmp_path / "shards"),
        "deformable-detr-demo",
    )

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["mlflow.runName"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_id: run.info.status for run in children} == {
        record.run_id: record.status for record in records.values()
    }
    assert len(runs) == 4
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "trials.txt"}
    assert parent.data.metrics["val/AR100"] == max(run.data.metrics["val/AR100"] for run in children)
    for run in children:
        assert run.info.status == "KILLED" or run.data.metrics["val/AR100"] >= 0

"""Real sweeps: Ray Tune over whole Ray Train runs, nested MLflow runs, and the resources of a stopped trial."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml
from support.paths import ROOT

from pipeline.config import load_config
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.runs.record import read_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
TINY = {
    "data.train": "shards",
    "data.val": "shards",
    "train.epochs": 2,
    "train.eval_epochs": 1,
    "model.enc_layers": 1,
    "model.dec_layers": 1,
    "model.hidden_dim": 32,
    "model.backbone.width": 8,
    "scaling.num_workers": 1,
}
# A sweep whose trials report made-up numbers instead of training, so that it is known which ones Ray must stop.
MADE_UP = """
import dataclasses, json, sys, time
import ray, ray.train
from ray.train.torch import TorchTrainer
from pipeline.launch.cluster import start_ray
from pipeline.config import dump
from pipeline.runs.record import RunRecord, read_run, write_run
from tune import trials
from tune.load import load_space

def worker(config):
    for epoch in range(1, config["train"]["epochs"] + 1):
        ray.train.report({"val/AP": config["optim"]["lr"], "epoch": epoch})
        time.sleep(1)

def train(config, *, parent_run_id, callbacks):
    folder = f"{config.storage}/{config.name}"
    write_run(RunRecord(config.name, folder, dump(config)))
    scaling = ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": config.scaling.cpus_per_worker})
    settings = ray.train.RunConfig(name=config.name, storage_path=config.storage, callbacks=list(callbacks))
    TorchTrainer(worker, train_loop_config=dump(config), scaling_config=scaling, run_config=settings).fit()
    write_run(dataclasses.replace(read_run(folder), status="FINISHED"))

space = load_space("space.yaml")
start_ray()
total = ray.cluster_resources()["CPU"]
outcomes = trials.run_trials(space, None, train)
deadline = time.monotonic() + 60
while ray.available_resources().get("CPU", 0) < total and time.monotonic() < deadline:
    time.sleep(1)
free = ray.available_resources().get("CPU", 0)
print("RESULT" + json.dumps([total, free, [dataclasses.asdict(outcome) for outcome in outcomes]]))
"""


@pytest.fixture
def other_ray() -> Iterator[None]:
    """Another Ray on this machine, as a colleague's job would start it."""
    code = "import ray, sys; ray.init(num_cpus=0, include_dashboard=False); print('up', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == b"up"
    yield
    process.communicate(timeout=60)  # closes its standard input, which ends it


def run(folder: Path, *command: str) -> str:
    """Run Python in `folder`, as a user would: relative paths mean this folder, in every trial and worker too."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def write_space(folder: Path, **space: object) -> None:
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))


@pytest.mark.usefixtures("other_ray")
def test_stopped_trial_releases_its_resources(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    write_space(
        tmp_path,
        config="base.yaml",
        # one trial fills the machine: the next one starts only if all of it comes back
        overrides={"storage": str(tmp_path / "runs"), "train.epochs": 9, "scaling.cpus_per_worker": os.cpu_count()},
        search={"method": "asha", "samples": 1, "grace": 1, "reduction": 2},
        space={"optim.lr": {"grid": [0.3, 0.1, 0.2, 0.4]}},
    )
    (tmp_path / "sweep.py").write_text(MADE_UP)
    output = run(tmp_path, "sweep.py")
    total, free, outcomes = json.loads(output.partition("RESULT")[2])
    assert free == total
    assert [(outcome["values"]["optim.lr"], outcome["status"], outcome["score"]) for outcome in outcomes] == [
        (0.3, "finished", 0.3),
        (0.1, "stopped early", 0.1),
        (0.2, "stopped early", 0.2),
        (0.4, "finished", 0.4),
    ]
    assert [outcome["epochs"] for outcome in outcomes][::3] == [9, 9]
    assert all(1 <= outcome["epochs"] < 9 for outcome in outcomes[1:3])
    records = [read_run(str(tmp_path / "runs" / outcome["name"])) for outcome in outcomes]
    assert [record.status for record in records] == ["FINISHED", "KILLED", "KILLED", "FINISHED"]


def test_sweep_runs_trials_and_reports_the_best(tmp_path: Path) -> None:
    annotations, images = write_synthetic(tmp_path / "raw", images=16, seed=0, size=96)
    build_shards(annotations, images, tmp_path / "shards")
    write_space(
        tmp_path,
        config=str(ROOT / "jobs/configs/demo.yaml"),
        overrides={"name": "sweep", **TINY},
        search={"method": "grid"},
        space={"optim.lr": {"grid": [1e-3, 1e-8]}, "model.enc_points, model.dec_points": {"grid": [2]}},
    )
    output = run(tmp_path, "-m", "tune.sweep", "space.yaml")
    assert "python -m jobs.train" in output

    records = [read_run(str(path.parent)) for path in sorted((tmp_path / "runs/sweep").glob("sweep-*/run.json"))]
    assert [record.config["optim"]["lr"] for record in records] == [1e-3, 1e-8]
    assert [record.status for record in records] == ["FINISHED", "FINISHED"]
    assert records[0].config["model"]["enc_points"] == records[0].config["model"]["dec_points"] == 2

    best = load_config(tmp_path / "runs/sweep/best.yaml")
    assert best.optim.lr in (1e-3, 1e-8)
    assert best.name == "sweep-best"
    assert best.tracking.register_as == "deformable-detr-demo"

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (parent,) = [run for run in runs if run.data.tags["mlflow.runName"] == "sweep"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_id for run in children} == {record.run_id for record in records}
    assert len(runs) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"best.yaml", "trials.txt"}
    scores = [point.value for run in children for point in client.get_metric_history(run.info.run_id, "val/AP")]
    assert len(scores) == 4  # two epochs of two trials, each logged once
    assert parent.data.metrics["val/AP"] == pytest.approx(max(scores))
    assert not client.search_registered_models()  # trials register nothing

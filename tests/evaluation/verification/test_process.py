"""What a verification records if pycocotools finds other numbers: in the run, its curves, its registered version."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.evaluation.verification.process import record
from pipeline.evaluation.verification.request import VERIFIED, Place
from pipeline.runs.evaluations import Evaluation, read_evaluations, write_evaluations
from pipeline.runs.record import RunRecord, write_run
from pipeline.runs.verifications import Verdict
from pipeline.tracking.client import connect
from pipeline.tracking.lineage import LOGGED_MODEL_TAG
from pipeline.tracking.store import TrackingStore

STEP = 9
SCORED, STANDS = {"AP": 0.5, "AP50": 0.75}, {"AP": 0.25, "AP50": 0.75}


@pytest.fixture
def client(tmp_path: Path) -> Any:
    return connect(TrackingStore(f"sqlite:///{tmp_path}/mlflow.db"), create=True)


def test_record_difference_corrects_the_run_and_its_version_of_that_step(tmp_path: Path, client: Any) -> None:
    experiment = client.create_experiment("verification")
    run_id = client.create_run(experiment).info.run_id
    folder = str(tmp_path / "run")
    write_run(RunRecord("run", folder, {}, run_id))
    rows = [("a", 5.0, {"AP": 0.3, "AP50": 0.6}), ("b", float(STEP), SCORED)]
    write_evaluations(folder, [Evaluation(name, {"epoch": 0.0, "step": at, **entry}) for name, at, entry in rows])
    for key, value in {**SCORED, "AP_best": SCORED["AP"]}.items():
        client.log_metric(run_id, f"val/{key}", value, step=STEP)
    model = client.create_logged_model(experiment, name="detector", source_run_id=run_id)
    client.create_registered_model("seen")
    numbers = {f"val/{key}": repr(value) for key, value in SCORED.items()} | {LOGGED_MODEL_TAG: model.model_id}
    source = str(tmp_path / "model")
    for step in (STEP, 5):  # the second one has the same number by chance
        client.create_model_version("seen", source, run_id=run_id, tags={**numbers, "step": str(step)})

    record(Verdict(STEP, "fast 1", "pycocotools 2", ["precision"], SCORED, STANDS), Place(STEP, folder, run_id), client)

    assert read_evaluations(folder)[1].entry["AP"] == STANDS["AP"]
    run = client.get_run(run_id).data
    assert (run.metrics["val/AP"], run.metrics["val/AP_best"]) == (STANDS["AP"], 0.3)
    assert "differs" in run.tags[VERIFIED]
    assert client.get_model_version("seen", "1").tags["val/AP"] == repr(STANDS["AP"])
    assert client.get_model_version("seen", "1").tags["val/AP50"] == repr(SCORED["AP50"])
    assert client.get_model_version("seen", "2").tags["val/AP"] == repr(SCORED["AP"])
    page = {metric.key: metric.value for metric in client.get_logged_model(model.model_id).metrics}
    assert page == {"val/AP": STANDS["AP"]}

"""`make demo` as a new user runs it: it trains, registers, draws. Ten minutes on two cores."""

import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from PIL import Image
from support.paths import ROOT


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_learns_registers_and_draws(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = [
        f"storage={tmp_path}/runs",
        f"data.train={tmp_path}/data/train",
        f"data.val={tmp_path}/data/val",
        f"tracking.uri={uri}",
    ]
    command = [sys.executable, "-m", "jobs.demo", *settings]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = re.search(r"^AP50 +(\S+)", finished.stdout, re.MULTILINE)
    assert found
    assert float(found[1]) >= 0.65
    assert mlflow.MlflowClient(uri).get_model_version_by_alias("deformable-detr-demo", "champion")
    images = sorted((tmp_path / "runs" / "demo").glob("detections_*.png"))
    assert len(images) == 3
    for path in images:
        with Image.open(path) as image:
            image.verify()

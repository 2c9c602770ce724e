"""A login in the environment or in an older run's record is never stored or printed."""

import copy
import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from support.helpers import tiny_config, tiny_run

from pipeline.config import dump, dump_yaml
from pipeline.launch.preflight import check_tracking, with_store
from pipeline.registry.register import register
from pipeline.runs.record import write_run
from pipeline.tracking.run import finish_run, start_run

SECRET = "hunter2secret"


def test_login_is_in_no_file_and_no_output(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:{dead.getsockname()[1]}")
        config = tiny_config(storage=str(tmp_path / "runs"))
        store = check_tracking(config)
        config = with_store(config, store)
        assert start_run(config.tracking, config, "tiny", knob=store.knob) is None
        finish_run(store.uri, "0" * 32, "FAILED")
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    record = tiny_run(tmp_path / "runs" / "tiny", config)
    write_run(record)
    assert dump(config)["tracking"]["uri"].startswith("http://127.0.0.1:")
    older = copy.deepcopy(record.config)  # as version 0.1 wrote it
    older["storage"], older["tracking"]["uri"] = f"s3://AKIA1:{SECRET}@bucket/runs", f"http://me:{SECRET}@host"
    register(replace(record, config=older), "tiny", "champion", f"sqlite:///{tmp_path}/mlflow.db")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "run.json", "config.yaml", "MLmodel"} <= {path.name for path in files}
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    printed = capfd.readouterr()
    assert SECRET not in caplog.text + printed.out + printed.err
    assert "training continues without MLflow" in caplog.text

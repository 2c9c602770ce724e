"""Logins are found at any position of an address, and other text is not changed."""

import re
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from pipeline.config import Config, from_record, load_config, override
from pipeline.errors import ConfigError
from pipeline.files.credentials import holds_login, login_fault, redact, without_login
from pipeline.files.shard_files import Store
from pipeline.files.storage import exists

SECRET = "hunter2secret"
WITH_LOGIN = {
    f"http://me:{SECRET}@host:5000": "http://host:5000",
    f"https://{SECRET}@host/mlflow": "https://host/mlflow",
    f"https://me:a/{SECRET}#?@host/x": "https://host/x",  # a password that nobody escaped
    f"http://me:{SECRET}@[::1]:5000": "http://[::1]:5000",
    f"postgresql+psycopg2://me:{SECRET}@db:5432/mlflow?sslmode=require": (
        "postgresql+psycopg2://me@db:5432/mlflow?sslmode=require"
    ),
    f"postgresql://me:1/{SECRET}@db/mlflow": "postgresql://me@db/mlflow",
    f"mysql://db/mlflow?user=me&password={SECRET}": "mysql://db/mlflow?user=me",
    f"mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D{SECRET}": "mssql+pyodbc:///",
    f"s3://AKIA1:{SECRET}@bucket/runs": "s3://bucket/runs",
    f"zip://a.zip::s3://AKIA1:{SECRET}@bucket/x": "zip://a.zip::s3://bucket/x",
    f"https://host/x?versionId=3&X-Amz-Credential=AKIA1&X-Amz-Signature={SECRET}": "https://host/x?versionId=3",
    f"https://host/x?sv=2024&sig={SECRET}": "https://host/x?sv=2024",
    f"https://host/x?access_token={SECRET}": "https://host/x",
    f"https://host/x?api_key={SECRET}&n=1": "https://host/x?n=1",
    f"https://host/x#token={SECRET}": "https://host/x",
    f"sftp://me:{SECRET}@host/runs": "sftp://host/runs",
    f"abfs://container@account.dfs.core.windows.net/x?account_key={SECRET}": (
        "abfs://container@account.dfs.core.windows.net/x"
    ),
}
WITHOUT = (
    "",
    "runs",
    f"/data/a:{SECRET}@b?password={SECRET}",  # a path
    "sqlite:///runs/mlflow.db",
    "sqlite:////data/me@home:2/ml?flow.db",
    "http://host:5000",
    "http://[::1]:5000/mlflow",
    "https://host:8443/a/me@there",
    "postgresql://me@db/mlflow?sslmode=verify-full&passfile=/home/me/.pgpass",
    "mysql+pymysql://db/mlflow?read_default_file=/home/me/my.cnf",
    "s3://bucket/run@1:2/x",
    "abfss://container@account.dfs.core.windows.net/runs",
    "sftp://me@host/runs",
    "https://host/x?version=3#part",
    "zip://a.zip::s3://bucket/x",
    "DEFAULT",
)


@pytest.mark.parametrize("address", WITH_LOGIN)
def test_without_login_keeps_rest_of_address(address: str) -> None:
    plain = WITH_LOGIN[address]
    assert without_login(address) == plain
    assert holds_login(address)
    assert not holds_login(plain)
    said = redact(f"cannot open '{address}' and {address} again")
    assert SECRET not in said
    assert "again" in said
    fault = login_fault(address, "storage")
    assert fault.startswith("storage: ")
    assert SECRET not in fault


@pytest.mark.parametrize("address", WITHOUT)
def test_without_login_plain_address_is_unchanged(address: str) -> None:
    assert without_login(address) == address
    assert not login_fault(address, "storage")


@example("a@b/c")
@example("a::b")
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="'\""), min_size=1))
def test_without_login_removes_any_password(password: str) -> None:
    address = f"http://me:{password}@host/end"
    # a number first would be the port of a host `me`, and a scheme after `::` the next address of a chain
    assume(not re.match(r"\d+[/?#]|.*::.*://", password))
    assert without_login(address) == "http://host/end"
    assert redact(f"see {address} there") == "see http://host/end there"


@pytest.mark.parametrize(
    ("key", "address", "instead"),
    [
        ("tracking.uri", f"http://me:{SECRET}@host", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri", f"postgresql://me:{SECRET}@db/mlflow", "PGPASSWORD"),
        ("tracking.uri", f"mysql://me:{SECRET}@db/mlflow", "read_default_file"),
        ("storage", f"s3://AKIA1:{SECRET}@bucket", "AWS_SECRET_ACCESS_KEY"),
        ("data.train", f"https://me:{SECRET}@host", "fsspec"),
        ("data.val", f"gs://me:{SECRET}@bucket", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("data.cache_dir", f"abfs://c@a/x?sas_token={SECRET}", "AZURE_STORAGE_ACCOUNT_KEY"),
        ("model.init_from", f"https://host/w.pth?token={SECRET}", "fsspec"),
    ],
)
def test_config_with_login_is_refused_with_advice(key: str, address: str, instead: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\n")
    for refused in (
        lambda: load_config(tmp_path / "run.yaml", [f"{key}={address}"]),
        lambda: load_config(tmp_path / "run.yaml", {key: address}),
        lambda: override(Config(), [f"{key}={address}", "no.such=1"]),
        lambda: override(Config(), [f"{key}={address}", "seed=-1"]),
        lambda: override(Config(), [f"seed={address}"]),
    ):
        with pytest.raises(ConfigError) as raised:
            refused()
        assert SECRET not in str(raised.value)
    with pytest.raises(ConfigError, match=f"{key}: .*{instead}"):
        load_config(tmp_path / "run.yaml", [f"{key}={address}"])


def test_config_of_old_file_loads_without_login() -> None:
    config = from_record(
        {"storage": f"s3://AKIA1:{SECRET}@bucket/runs", "tracking": {"uri": f"http://me:{SECRET}@host"}}, "run.json"
    )
    assert (config.storage, config.tracking.uri) == ("s3://bucket/runs", "http://host")


def test_stores_address_with_login_is_refused() -> None:
    for opened in (exists, Store):
        with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as raised:
            opened(f"s3://AKIA1:{SECRET}@bucket/x")
        assert SECRET not in str(raised.value)

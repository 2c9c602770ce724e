"""What a server is started with: bounds, who may reach it, and the token."""

import importlib
import socket
from pathlib import Path

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema
from support.helpers import tiny_config, tiny_run
from support.paths import ROOT
from support.serving import TOKEN as SECRET

from jobs.cli import main
from jobs.serve import build_parser, run
from pipeline.config import ScalingConfig
from pipeline.config.serving import ServingConfig
from pipeline.errors import ConfigError, ResourceError
from pipeline.runs.record import write_run
from pipeline.serving import server
from pipeline.serving.arguments import (
    TOKEN,
    Arguments,
    check_reach,
    parse_arguments,
    parse_settings,
    public_name,
    read_token,
)
from pipeline.serving.guard import token_digest


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


def test_parse_settings_takes_text_of_flags() -> None:
    given = {"host": "::1", "port": "80", "use_gpu": "true", "batch_size": "4", "timeout_s": "2.5"}
    settings = parse_settings(given)
    assert settings == ServingConfig(host="::1", port=80, use_gpu=True, batch_size=4, timeout_s=2.5)
    assert parse_settings({"batch_size": "auto"}) == ServingConfig()


def test_parse_settings_names_every_wrong_flag() -> None:
    wrong = {
        "host": "example",
        "port": "0",
        "replicas": "no",
        "batch_size": "257",
        "timeout_s": "0",
        "max_pixels": "65e6",
    }
    with pytest.raises(ConfigError) as caught:
        parse_settings(wrong)
    for name in wrong:
        assert f"--{name.replace('_', '-')}" in str(caught.value)


def test_parse_arguments_names_every_wrong_entry() -> None:
    with pytest.raises(ConfigError, match=r"args\.settings\.port.*args\.models"):
        parse_arguments({"model": "mine", "settings": {"port": -1}, "models": "x"})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("models:/mine/3", "models:/mine/3"),
        ("/home/me/runs/mine/checkpoint_1", "mine/checkpoint_1"),
        ("s3://bucket/secret/runs/mine/", "runs/mine"),
    ],
)
def test_public_name_has_no_path(model: str, name: str) -> None:
    assert public_name(Arguments(model=model)) == name
    assert public_name(Arguments(model=model, name="cats")) == "cats"


@pytest.mark.parametrize(("gpu", "size"), [(False, 1), (True, 8)])
def test_batch_size_auto_follows_the_device(gpu: bool, size: int) -> None:
    assert ServingConfig().resolved_batch_size(gpu) == size
    assert ServingConfig(batch_size=3).resolved_batch_size(gpu) == 3
    assert ServingConfig(replicas=2, max_waiting=5).max_in_flight >= 5 + 2 * ServingConfig().per_replica(gpu)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_check_reach_other_machines_need_a_token_or_the_word(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServingConfig(host=host)
    with pytest.raises(ConfigError, match=f"{TOKEN}.*--without-token"):
        check_reach(settings, without_token=False)
    assert not check_reach(settings, without_token=True)
    monkeypatch.setenv(TOKEN, SECRET)
    assert check_reach(settings, without_token=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_check_reach_loopback_needs_no_token(host: str) -> None:
    assert not check_reach(ServingConfig(host=host), without_token=False)


def test_read_token_gives_its_digest_and_refuses_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_token() == ""
    with pytest.raises(ConfigError, match=TOKEN):
        read_token(needed=True)
    monkeypatch.setenv(TOKEN, f" {SECRET}\n")
    assert read_token() == token_digest(SECRET)
    for wrong in ("short", "\u00e9" * 20, "\udcff" * 20):
        monkeypatch.setenv(TOKEN, wrong)
        with pytest.raises(ConfigError, match=TOKEN):
            read_token()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["absent"], "absent"), (["absent", "--port", "0"], "--port"), (["absent", "--host", "0.0.0.0"], TOKEN)],
)
def test_command_wrong_request_is_refused_before_ray(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "run_server", lambda _: pytest.fail("started"))
    assert main(build_parser(), run, arguments) == 2
    assert named in capsys.readouterr().err


def test_command_port_in_use_is_refused_where_this_machine_listens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(build_parser(), run, ["absent", "--port", port]) == 2
        assert f"127.0.0.1:{port}" in capsys.readouterr().err
        monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # then its nodes listen
        assert main(build_parser(), run, ["absent", "--port", port]) == 2
        assert port not in capsys.readouterr().err


def test_command_host_of_a_family_that_is_missing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", refuse)
    assert main(build_parser(), run, ["absent", "--host", "::1"]) == 2
    assert "::1" in capsys.readouterr().err


def test_check_room_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    server._check_room(ScalingConfig(num_workers=3, use_gpu=False))
    with pytest.raises(ResourceError, match=r"--replicas 2 of 2 CPUs each.* 1;"):
        server._check_room(ScalingConfig(num_workers=2, cpus_per_worker=2, use_gpu=False))
    with pytest.raises(ResourceError, match="GPU"):
        server._check_room(ScalingConfig(num_workers=1, use_gpu=True))


def test_write_config_is_what_ray_serve_reads_and_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has no secret, and the model's name means what it meant when the file was written."""
    monkeypatch.setenv(TOKEN, SECRET)
    folder, path = tmp_path / "runs" / "mine", tmp_path / "serve.yaml"
    write_run(tiny_run(folder, tiny_config(name="mine")))
    flags = ["--host", "0.0.0.0", "--replicas", "3", "--write-config", str(path)]
    assert main(build_parser(), run, [str(folder), *flags]) == 2
    assert "--use-gpu" in capsys.readouterr().err
    assert not path.exists()
    record = (folder / "run.json").read_bytes()
    assert main(build_parser(), run, [str(folder), "--write-config", f"{folder}/run.json", "--use-gpu", "false"]) == 2
    assert "a file of a run" in capsys.readouterr().err
    assert (folder / "run.json").read_bytes() == record
    assert main(build_parser(), run, [str(folder), *flags, "--use-gpu", "false"]) == 0
    assert SECRET not in path.read_text()
    config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    bound = getattr(importlib.import_module(module), name)(application.args)
    assert bound._bound_deployment.num_replicas == 3
    # 16 clients got a third of the images/s of 4 while a request that found no free place waited half a second.
    assert bound._bound_deployment._deployment_config.request_router_config.max_backoff_s <= 0.05
    assert parse_arguments(application.args).model == str(folder / "checkpoint")
    assert parse_arguments(application.args).name == "runs/mine", "clients see no path of the server"
    monkeypatch.delenv(TOKEN)
    with pytest.raises(ConfigError, match=TOKEN):
        getattr(importlib.import_module(module), name)(application.args)


def test_page_of_the_documents_has_every_flag_with_its_default() -> None:
    table = (ROOT / "docs/serving.md").read_text()
    for name, field in ServingConfig.model_fields.items():
        assert f"| `--{name.replace('_', '-')}` | {field.default} |" in table

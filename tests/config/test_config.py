"""The config: one grammar, one precedence, every fault in one message, and nothing lost between its forms."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from support.paths import ROOT

from pipeline.config import (
    Config,
    OptimConfig,
    dump,
    dump_yaml,
    flatten,
    from_dict,
    from_record,
    load_config,
    override,
    parse_overrides,
)
from pipeline.config.raw import Argument
from pipeline.errors import ConfigError

PRESETS = sorted((ROOT / "jobs" / "configs").glob("[!_]*.yaml"))


def write(folder: Path, name: str, tree: Any) -> Path:
    path = folder / name
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def faults(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, list(overrides))
    assert raised.value.exit_code == 2
    return str(raised.value)


def test_precedence_is_defaults_base_file_override(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", {"optim": {"lr": 0.1, "clip": 0.5}, "seed": 1, "model": {"backbone": {"width": 8}}})
    top = write(tmp_path, "top.yaml", {"base": "base.yaml", "optim": {"lr": 0.2}, "seed": 2})
    config = load_config(top, ["seed=3", "model.backbone.name=conv5"])
    assert (config.seed, config.optim.lr, config.optim.clip) == (3, 0.2, 0.5)
    assert (config.model.backbone.name, config.model.backbone.width) == ("conv5", 8)
    assert config.optim.weight_decay == OptimConfig().weight_decay
    assert load_config(top, {"optim.lr": 0.3}).optim.lr == 0.3


def test_base_is_found_beside_the_file_and_has_no_base_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    write(folder, "low.yaml", {"seed": 1})
    write(folder, "middle.yaml", {"base": "low.yaml"})
    top = write(folder, "top.yaml", {"base": "middle.yaml"})
    monkeypatch.chdir(tmp_path)
    assert load_config(folder / "middle.yaml").seed == 1
    assert "only one level" in faults(top)
    assert "cannot read config" in faults(write(folder, "lost.yaml", {"base": "none.yaml"}))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optim.lr=1e-4", 1e-4),  # YAML 1.1 reads this as a string
        ("train.epochs=7", 7),
        ("model.refine=true", True),
        ("optim.drop_epochs=[3, 5]", (3, 5)),
        ("train.max_steps=null", None),
        ("data.train=s3://bucket/a=b", "s3://bucket/a=b"),
        ("data.train=", ""),
        ("name=night-7", "night-7"),
        ("name=007", "007"),
        ("name=2024-05-01", "2024-05-01"),
        ("name=on", "on"),
        ("data.train=/data/set #2/train", "/data/set #2/train"),
        ("tracking.experiment=1", "1"),
    ],
)
def test_override_text_is_taken_as_typed_and_other_values_are_yaml(tmp_path: Path, text: str, value: Any) -> None:
    config = load_config(write(tmp_path, "c.yaml", {}), [text])
    assert flatten(config)[text.partition("=")[0]] == value


def test_faults_are_of_the_file_and_of_what_was_given_beside_it(tmp_path: Path) -> None:
    path = write(tmp_path, "own.yaml", {"seed": -1})
    assert faults(path).splitlines()[0] == f"{path}:"
    assert faults(path, "optim.lrr=1").splitlines()[0] == f"{path} and the key=value settings:"


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", {"optim": {"learning_rate": 1}, "train": {"epochs": 0, "zero_stage": 7}})
    message = faults(path, "model.num_class=5", "nonsense", "seed.x=1", "optim.lr=[")
    for part in (
        str(path),
        "optim.learning_rate: unknown key; did you mean 'optim.lr'?",
        "model.num_class: unknown key; did you mean 'model.num_classes'?",
        "train.epochs: Input should be greater than or equal to 1 (got 0)",
        "train.zero_stage",
        "'nonsense': overrides are written key=value",
        "optim.lr: '[' is not a YAML value",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.profile_steps=[15, 10]", "profile_steps [15, 10] ends before it begins"),
        ("train.profile_steps=[0, 10]", "train.profile_steps"),  # steps are counted from 1
        ("train.profile_steps=10", "train.profile_steps"),
        ("evaluation.where=elsewhere", "evaluation.where"),
        ("evaluation.task_minutes=0", "evaluation.task_minutes"),
    ],
)
def test_how_a_run_is_watched_and_evaluated_is_checked(tmp_path: Path, override: str, said: str) -> None:
    assert said in faults(write(tmp_path, "c.yaml", {}), override)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optim.learnin_rate", "optim.lr"),
        ("optim.weight_deca", "optim.weight_decay"),
        ("train.globl_batch", "train.global_batch"),
        ("lr", "optim.lr"),
        ("modeel", "model"),
        ("model.backbone.nme", "model.backbone.name"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path: Path, wrong: str, meant: str) -> None:
    assert f"{wrong}: unknown key; did you mean '{meant}'?" in faults(write(tmp_path, "c.yaml", {}), f"{wrong}=1")


def test_config_at_a_url_has_its_base_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", {"name": "below", "seed": 7})
    base = f"{tmp_path.as_uri()}/base.yaml"
    for number, other in enumerate(["base.yaml", base, str(tmp_path / "base.yaml")]):
        write(tmp_path, f"top{number}.yaml", {"base": other, "name": "top"})
        config = load_config(f"{tmp_path.as_uri()}/top{number}.yaml")
        assert (config.name, config.seed) == ("top", 7)
    for missing in (f"{tmp_path.as_uri()}/none.yaml", "memory://none/none.yaml", "nosuch://bucket/none.yaml"):
        with pytest.raises(ConfigError, match=f"cannot read config {missing}: ."):
            load_config(missing)


def test_keys_of_a_sweep_say_where_they_are_described(tmp_path: Path) -> None:
    message = faults(write(tmp_path, "c.yaml", {}), "search.samples=3")
    assert "search: unknown key; it belongs to the space file of a sweep (tune.sweep), see docs/" in message
    path = write(tmp_path, "space.yaml", {"config": "c.yaml", "space": {"optim.lr": {"choice": [1]}}})
    assert faults(path) == f"{path} is the space file of a sweep; start it with `python -m tune.sweep {path}`"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("optim.lr=fast", "optim.lr: Input should be a valid number"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.lr=.inf", "optim.lr"),
        ("optim.lr=0", "greater than 0"),
        ("optim=3", "optim: Input should be a valid dictionary"),
        ("model.op=gpu", "'auto', 'cuda', 'cpu' or 'torch'"),
        ("train.epochs=1.5", "train.epochs: Input should be a valid integer"),
        ("name=a b", "name: String should match pattern"),
        ("name=../escape", "name: String should match pattern"),
        ("name=", "name: String should match pattern"),
        ("model.heads=7", "hidden_dim 256 is not a multiple of heads 7"),
        ("model.two_stage=true", "two_stage needs refine"),
        ("data.labels=raw", "needs model.num_classes: 91"),
        ("model.backbone={name: conv5, dilation: true}", "model.backbone: dilation is defined for ResNets"),
        ("model.backbone={name: conv5, deformable_conv: true}", "deformable_conv is defined for ResNets and ResNeXts"),
        ("model.backbone={name: efficientnet_b0, dilation: true}", "not for name=efficientnet_b0"),
        ("model={levels: 1, neck: fpn}", "neck: fpn mixes levels, and levels: 1"),
        ("model={levels: 1, neck: bifpn}", "neck: bifpn mixes levels"),
        ("model.neck_layers=2", "neck_layers counts the repetitions of neck: bifpn"),
        ("train.micro_batch=3", "global_batch 32 is not a multiple of micro_batch 3"),
        ("train={global_batch: 1, micro_batch: 2}", "global_batch 1 is not a multiple of micro_batch 2"),
    ],
)
def test_wrong_values_are_explained(tmp_path: Path, override: str, part: str) -> None:
    assert part in faults(write(tmp_path, "c.yaml", {}), override)


@pytest.mark.parametrize(
    ("name", "override", "part"),
    [
        ("faster_rcnn", "model.head_layers=3", "head_layers means nothing for model.name=faster_rcnn"),
        ("fcos", "model.queries=100", "queries means nothing for model.name=fcos"),
        ("efficientdet", "model.neck=fpn", "neck means nothing for model.name=efficientdet"),
        ("atss", "model.hidden_dim=48", "hidden_dim 48 must be a multiple of 32"),
        ("fcos", "model.backbone.dilation=true", "backbone.dilation: true is not for fcos"),
        ("faster_rcnn", "loss.classification=focal", "is trained with loss.classification=own, not focal"),
    ],
)
def test_baselines_refuse_what_they_do_not_read(tmp_path: Path, name: str, override: str, part: str) -> None:
    path = write(tmp_path, "c.yaml", {"model": {"name": name}, "loss": {"classification": "own"}})
    assert load_config(path).model.name == name
    assert part in faults(path, override)


@pytest.mark.parametrize("text", ["[1, 2]", "just text", "a: [", "\x00", "\t- x: 1"])
def test_files_that_are_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "c.yaml", text)
    assert str(path) in faults(path)


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    assert "none.yaml: No such file" in faults(tmp_path / "none.yaml")
    assert "cannot read config" in faults(tmp_path)  # a folder
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9")
    assert "is not YAML" in faults(path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "c.yaml", "")) == Config()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_survive_every_form(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert from_dict(dump(config)) == config
    assert load_config(write(tmp_path, "again.yaml", dump_yaml(config))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    flat = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(config).items()}
    assert load_config(write(tmp_path, "empty.yaml", ""), flat) == config


@pytest.mark.parametrize("place", ["base.yaml", "top.yaml"])
def test_published_results_in_a_file_of_an_earlier_version_are_ignored(tmp_path: Path, place: str) -> None:
    files: dict[str, dict[str, Any]] = {"base.yaml": {"seed": 1}, "top.yaml": {"base": "base.yaml", "name": "old"}}
    files[place]["published"] = {"table": "1", "ap": 43.8, "gone": [1]}
    for name, tree in files.items():
        write(tmp_path, name, tree)
    assert load_config(tmp_path / "top.yaml") == from_dict({"seed": 1, "name": "old"})
    assert from_record({"seed": 1, "published": {"ap": 43.8}}, "run.json") == from_dict({"seed": 1})
    assert "published: unknown key" in faults(tmp_path / "top.yaml", "published.ap=1")


def test_flat_keys_are_the_override_grammar() -> None:
    flat = flatten(Config())
    assert flat["optim.lr"] == Config().optim.lr
    assert flat["model.backbone.name"] == "resnet50"
    assert not any(isinstance(value, dict) for value in flat.values())


def test_override_changes_only_what_is_named() -> None:
    config = from_dict({"seed": 5})
    changed = override(config, ["data.val=elsewhere"])
    assert changed.data.val == "elsewhere"
    assert override(changed, ["data.val="]) == config
    with pytest.raises(ConfigError, match=r"data\.vla: unknown key"):
        override(config, ["data.vla=elsewhere"])


def test_parse_overrides_collects_faults_instead_of_raising() -> None:
    found: list[str] = []
    assert parse_overrides(["seed=1", "=2", "x", "a=b=c"], found) == [("seed", Argument("1")), ("a", Argument("b=c"))]
    assert len(found) == 2


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Config().optim.lr = 1.0  # type: ignore[misc]


def test_the_error_survives_a_process_boundary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(tmp_path / "none.yaml")
    again = pickle.loads(pickle.dumps(raised.value))
    assert (type(again), str(again)) == (ConfigError, str(raised.value))


def test_keys_that_a_config_no_longer_has_are_left_out_of_a_record_only() -> None:
    written: dict[str, Any] = {**dump(Config()), "gone": {"a": 1}}
    written["train"] = {**written["train"], "gone": 1}
    written["model"] = {**written["model"], "backbone": {**written["model"]["backbone"], "gone": "x"}}
    assert from_record(written, "run.json") == Config()
    with pytest.raises(ConfigError, match=r"train\.gone: unknown key"):
        from_dict(written)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "drop_epochs", [3, -1]),
        ("tracking", "alias", "latest"),
        ("optim", "drop_factor", 2.0),
        ("", "seed", -1),
    ],
)
def test_value_of_a_record_that_is_refused_today_takes_its_default(
    section: str, key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {"name": "old", section: {key: value}} if section else {"name": "old", key: value}
    assert from_record(tree, "run.json") == from_dict({"name": "old"})
    assert f"{section}.{key}".lstrip(".") in caplog.text
    with pytest.raises(ConfigError, match=key):
        from_dict(tree)


def test_record_keeps_the_checks_of_the_model_and_between_sections() -> None:
    with pytest.raises(ConfigError, match=r"model\.queries"):
        from_record({"model": {"queries": 0}}, "run.json")
    with pytest.raises(ConfigError, match=r"micro_batch"):
        from_record({"train": {"global_batch": 3}}, "run.json")
    with pytest.raises(ConfigError, match=r"model"):
        from_record({"model": 3}, "run.json")


@pytest.mark.parametrize("setting", ["train.patience=3", "train.max_minutes=5"])
def test_settings_that_end_a_run_are_refused_with_evaluation_tasks(setting: str) -> None:
    assert override(Config(), [setting]).ends_by_itself
    with pytest.raises(ConfigError, match=r"evaluation\.where"):
        override(Config(), [setting, "evaluation.where=tasks"])


def test_auto_numbers_load_from_a_command_line_and_are_refused_until_they_are_known() -> None:
    config = override(Config(), ["model.num_classes=auto", "train.micro_batch=auto", "train.global_batch=7"])
    assert from_dict(dump(config)) == config
    for read in (lambda: config.model.classes, lambda: config.train.pad_group):
        with pytest.raises(ConfigError, match="auto"):
            read()
    with pytest.raises(ConfigError, match=r"model\.num_classes"):
        override(config, ["model.num_classes=automatic"])

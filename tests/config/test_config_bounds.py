"""Every field has its bounds: a random config ends in a Config whose model builds, or in a ConfigError."""

import math
from pathlib import Path
from typing import Any, get_args

import mlflow.utils.validation as mlflow_rules
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from pipeline.config import Config, Section, dump, dump_yaml, flatten, from_dict, from_record, load_config, override
from pipeline.config.base import LocationMark, map_locations
from pipeline.config.model import DETECTORS
from pipeline.config.names import check_alias, check_model_name
from pipeline.config.raw import field_type
from pipeline.errors import ConfigError
from pipeline.model import build_model
from tune.settings import Search

KEYS = sorted(flatten(Config()))


def numbers_in(kind: Any) -> bool:
    return kind in (int, float) or any(numbers_in(part) for part in get_args(kind))


NUMERIC = [key for key in KEYS if numbers_in(field_type(Config, key))]


def accepted(key: str, value: Any) -> bool:
    *parents, leaf = key.split(".")
    tree: dict[str, Any] = {leaf: value}
    for name in reversed(parents):
        tree = {name: tree}
    try:
        from_dict(tree)
    except ConfigError as error:
        assert leaf in str(error)  # noqa: PT017  # a value may be refused, but by its own name
        return False
    return True


@pytest.mark.parametrize("key", NUMERIC)
def test_number_without_end_or_bound_is_refused(key: str) -> None:
    """A new field needs a lowest and a highest value too; the types for them are in `pipeline.config.base`."""
    for value in (math.nan, math.inf, -math.inf, 2**64, -(2**64), 1e300, -1e300, -2):
        for form in (value, [value], [value, value], [1, value]):
            assert not accepted(key, form), f"{key}={form}"


@pytest.mark.parametrize("field", [name for name, field in Search.model_fields.items() if numbers_in(field.annotation)])
def test_number_of_a_search_without_end_or_bound_is_refused(field: str) -> None:
    for value in (math.nan, math.inf, 2**64, -1, 1e300):
        with pytest.raises(ValueError, match=field):
            Search.model_validate({field: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.augment.scales", "[]"),
        ("data.augment.scales", "[0]"),
        ("data.augment.scales", "[-5]"),
        ("data.augment.crop_scales", "[]"),
        ("data.augment.crop_range", "[600, 384]"),
        ("data.augment.crop_range", "[0, 384]"),
        ("data.augment.crop_range", "[384]"),
        ("optim.betas", "[1.5, 0.9]"),
        ("optim.betas", "[0.9, 1]"),
        ("optim.betas", "[.nan, 0.9]"),
        ("optim.drop_epochs", "[-1]"),
        ("optim.drop_epochs", "[0]"),
        ("optim.drop_factor", "2"),
        ("seed", str(2**64)),
        ("seed", "true"),
        ("train.max_steps", "true"),
        ("optim.betas", "[0.9, false]"),
        ("train.hang_minutes", "false"),
        ("storage", ""),
        ("storage", "pipe:cat x"),
        ("data.train", "pipe:cat x"),
        ("data.val", "s3:/bucket"),
        ("data.cache_dir", "pipe:x"),
        ("model.init_from", "models:/detector@champion"),
        ("model.backbone.weights", "pipe:x"),
        ("model.backbone.weights", ""),
        ("tracking.experiment", ""),
        ("tracking.register_as", "a/b"),
        ("tracking.register_as", "a:b"),
        ("tracking.register_as", ".."),
        ("tracking.register_as", "n" * 257),
        ("tracking.alias", "latest"),
        ("tracking.alias", "Latest"),
        ("tracking.alias", "v3"),
        ("tracking.alias", "my alias"),
        ("name", "n" * 201),
    ],
)
def test_value_out_of_bounds_is_refused_by_its_key(key: str, value: str) -> None:
    with pytest.raises(ConfigError) as raised:
        override(Config(), [f"{key}={value}"])
    assert key.rpartition(".")[2] in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (f"seed={2**64 - 1}", 2**64 - 1),
        ("optim.drop_epochs=[]", ()),
        ("tracking.alias=", ""),
        ("tracking.alias=Prüf-1", "Prüf-1"),
    ],
)
def test_value_at_its_bound_is_taken(text: str, value: object) -> None:
    assert flatten(override(Config(), [text]))[text.partition("=")[0]] == value


NAMES = st.one_of(st.text(max_size=20), st.text("aZ9-_.:/@ v'\"", max_size=5), st.sampled_from(["latest", "v1", "."]))


def taken_by(rule: Any, text: str) -> bool:
    try:
        rule(text)
    except (MlflowException, ValueError):
        return False
    return True


@given(NAMES)
@example("..0")  # MLflow takes no name that begins as a parent folder
def test_model_name_that_is_taken_here_is_taken_by_mlflow(name: str) -> None:
    ours, theirs = taken_by(check_model_name, name), taken_by(mlflow_rules._validate_model_name, name)
    assert theirs or not ours
    assert ours or not theirs or not name.isprintable() or set(name) & set("@'\"")


@given(NAMES)
def test_alias_is_taken_here_as_by_mlflow(alias: str) -> None:
    rules = (mlflow_rules._validate_model_alias_name, mlflow_rules._validate_model_alias_name_reserved)
    theirs = all(taken_by(rule, alias) for rule in rules)
    assert taken_by(check_alias, alias) == (theirs and not alias.endswith("\n"))


@pytest.mark.parametrize("alias", ["previous", "previous-production"])
def test_alias_that_a_rollback_follows_is_not_given_to_a_version(alias: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.alias.*--rollback"):
        override(Config(), [f"tracking.alias={alias}"])


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(-1, 9),
        st.sampled_from(["auto", "none", "own", "softmax", "~", "~/x", "-", "pipe:x", "s3://b", "\0", "\udc80"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "x"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@SETTINGS
@given(st.dictionaries(st.sampled_from([*KEYS, "model", "optim", "nothing"]), VALUES, max_size=3))
def test_random_values_end_in_a_config_or_a_config_error(tmp_path: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    try:
        config = load_config(path, values)
    except ConfigError:
        return
    assert from_dict(dump(config)) == config
    assert from_record(dump(config), "run.json") == config
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from([*KEYS, "model", "a.b", ""]), st.text(max_size=12)), max_size=3))
def test_random_overrides_end_in_a_config_or_a_config_error(pairs: list[tuple[str, str]]) -> None:
    try:
        override(Config(), [f"{key}={text}" for key, text in pairs])
    except ConfigError:
        return


@SETTINGS
@given(st.one_of(st.binary(max_size=40), st.text(":{}[]&*!-?'\" \n#ab1", max_size=40).map(str.encode)))
def test_random_file_ends_in_a_config_or_a_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    try:
        load_config(path)
    except ConfigError:
        return


SWITCH = st.booleans()
FEW = st.integers(1, 2)
MODELS = st.sampled_from(get_args(DETECTORS)).flatmap(
    lambda name: st.fixed_dictionaries(
        {"name": st.just(name), "class_head": st.just("softmax" if name == "detr" else "sigmoid")},
        optional={
            "num_classes": st.integers(1, 3),
            "hidden_dim": st.sampled_from([8, 16, 32, 40, 64]),
            "backbone": st.fixed_dictionaries(
                {"name": st.sampled_from(["conv5", "resnet50", "efficientnet_b0"])},
                optional={
                    "norm": st.sampled_from(["frozen_batch", "group"]),
                    "dilation": SWITCH,
                    "deformable_conv": SWITCH,
                    "width": st.integers(8, 40),
                },
            ),
            **({} if name in ("deformable_detr", "detr") else {"head_layers": FEW}),
            **({} if name not in ("deformable_detr", "detr") else {
                "heads": st.sampled_from([1, 2, 8]), "enc_layers": FEW, "dec_layers": FEW, "ffn_dim": FEW,
                "queries": FEW,
            }),
            **({} if name != "deformable_detr" else {
                "levels": st.integers(1, 10), "enc_points": FEW, "dec_points": FEW, "cross_level": SWITCH,
                "neck": st.sampled_from(["none", "fpn", "bifpn"]), "refine": SWITCH, "two_stage": SWITCH,
            }),
        },
    )
)  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
@given(MODELS)
def test_model_section_that_is_accepted_builds(section: dict[str, Any]) -> None:
    head = {"deformable_detr": "focal", "detr": "softmax"}.get(section["name"], "own")
    try:
        config = from_dict({"model": section, "loss": {"classification": head}})
    except ConfigError:
        return
    with torch.device("meta"):
        build_model(config.model, load_backbone=False)


def marks(key: str) -> list[Any]:
    *parents, leaf = key.split(".")
    section: Any = Config
    for name in parents:
        section = section.model_fields[name].annotation
    return [mark for mark in section.model_fields[leaf].metadata if isinstance(mark, LocationMark)]


LOCATIONS = {"storage", "data.train", "data.val", "data.cache_dir", "model.init_from", "model.backbone.weights"}


def test_fields_that_hold_a_path_are_marked() -> None:
    assert {key for key in KEYS if marks(key)} == LOCATIONS


@pytest.mark.parametrize("key", sorted(LOCATIONS))
def test_tilde_is_the_home_folder(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert flatten(override(Config(), [f"{key}=~/x"]))[key] == "/home/somebody/x"
    assert flatten(override(Config(), [f"{key}=a~/x"]))[key] == "a~/x"


def test_paths_are_mapped_and_names_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "WORD").touch()
    (tmp_path / "imagenet").touch()

    def mapped(text: str) -> Any:
        found = flatten(map_locations(override(Config(), [text]), lambda path: f"<{path}>"))
        return found[text.partition("=")[0]]

    assert mapped("data.train=x") == "<x>"
    assert mapped("model.backbone.weights=IMAGENET1K_V2") == "IMAGENET1K_V2"
    assert mapped("model.backbone.weights=WORD") == "<WORD>"
    assert mapped("model.backbone.weights=a.pth") == "<a.pth>"
    assert mapped("model.backbone.weights=imagenet") == "imagenet"
    assert mapped("model.backbone.weights=none") == "none"
    assert mapped("name=x") == "x"


def test_section_of_the_space_takes_no_infinite_number() -> None:
    class Pair(Section):
        values: tuple[float, ...] = ()

    with pytest.raises(ValueError, match="values"):
        Pair(values=(math.nan,))

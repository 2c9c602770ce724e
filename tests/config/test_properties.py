"""Properties over drawn configs: every written form is read back as it was, and the last word on a setting counts."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, find, given, settings
from hypothesis import strategies as st
from support.drawn_configs import FIELDS, accepted, configs, put, values

from pipeline.config import Config, changed_for_resume, dump, dump_yaml, flatten, from_dict, from_record, load_config
from tune.settings import Domain, Search
from tune.space import Axis, Space

PROPERTY = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
# Settings that no other one restricts, so that any value of one goes with any value of another. `tracking.register_as`
# is not among them, because a trial registers no model.
FREE = sorted(
    key
    for key in FIELDS
    if key.partition(".")[0] in ("data", "optim", "tracking", "evaluation", "loss")
    and key not in ("data.labels", "loss.classification", "tracking.register_as")
)
# Settings of which no other value is accepted alone.
NEED_ANOTHER = {"data.labels", "model.name", "model.class_head", "model.neck_layers", "model.head_layers",
                "model.two_stage", "loss.classification", "scaling.min_workers", "train.channels_last",
                "train.delay_results"}  # fmt: skip
LAYERS = ("base", "file", "argument", "trial")


@PROPERTY
@given(configs())
@example(Config())
def test_config_survives_every_written_form(tmp_path: Path, config: Config) -> None:
    tree = dump(config)
    assert from_dict(tree) == config
    assert from_dict(json.loads(json.dumps(tree))) == config
    assert from_record(tree, "run.json") == config
    assert changed_for_resume(config, from_dict(tree)) == {}
    assert pickle.loads(pickle.dumps(config)) == config
    (tmp_path / "c.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("key", sorted(FIELDS.keys() - NEED_ANOTHER))
def test_drawn_values_of_a_setting_reach_beyond_its_default(key: str) -> None:
    """Else the properties would say nothing of it."""
    default = flatten(Config())[key]

    def is_another(value: Any) -> bool:
        config = accepted(put({}, key, value))
        return config is not None and flatten(config)[key] != default

    find(values(FIELDS[key]), is_another, settings=settings(deadline=None, phases=[Phase.generate], derandomize=True))


def as_argument(key: str, value: Any) -> str:
    """What is typed for a value: text as it is, everything else as YAML."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


@st.composite
def layered(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Up to four settings, each with accepted values in some of the layers: layer -> key -> value."""
    given: dict[str, dict[str, Any]] = {layer: {} for layer in LAYERS}
    for key in draw(st.lists(st.sampled_from(FREE), min_size=1, max_size=4, unique=True)):
        allowed = values(FIELDS[key]).filter(lambda value, key=key: accepted(put({}, key, value)) is not None)
        for layer in draw(st.sets(st.sampled_from(LAYERS), min_size=1)):
            given[layer][key] = draw(allowed)
    return given


@PROPERTY
@given(layered())
def test_later_layer_wins_for_each_setting(tmp_path: Path, given: dict[str, dict[str, Any]]) -> None:
    """Defaults < `base:` < YAML file < key=value < trial."""
    trees: dict[str, dict[str, Any]] = {"base": {}, "file": {"base": "base.yaml"}}
    for layer, tree in trees.items():
        for key, value in given[layer].items():
            tree = put(tree, key, value)
        (tmp_path / f"{layer}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    arguments = [as_argument(key, value) for key, value in given["argument"].items()]
    config = load_config(tmp_path / "file.yaml", arguments)
    assert config == expected(given, LAYERS[:-1])
    axes = tuple(Axis((key,), Domain(choice=(value,))) for key, value in given["trial"].items())
    trial = Space(config, Search(), axes).config(given["trial"], config.name)
    assert trial == expected(given, LAYERS)


def expected(given: dict[str, dict[str, Any]], layers: tuple[str, ...]) -> Config:
    tree: dict[str, Any] = {}
    for layer in layers:
        for key, value in given[layer].items():
            tree = put(tree, key, value)
    return from_dict(tree)

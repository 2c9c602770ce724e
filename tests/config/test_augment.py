"""Presets of augmentation: a setting's own value counts, else the preset's; the paper's presets add nothing."""

import hashlib
import json
from dataclasses import asdict, fields

import pytest

from jobs.presets import CONFIGS
from pipeline.config import AugmentConfig, Config, dump, from_dict, load_config, override
from pipeline.config.augment import PRESETS, Extras, Preset, describe_augmentation
from pipeline.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
def test_extras_are_the_presets_and_within_the_bounds_of_the_settings(preset: Preset) -> None:
    assert AugmentConfig(preset=preset).extras() == PRESETS[preset]
    written = AugmentConfig(**asdict(PRESETS[preset]))  # the values are legal ones of the settings
    assert written.extras() == PRESETS[preset]


@pytest.mark.parametrize(
    ("preset", "digest"),
    [("published", "a6f944e064f4"), ("none", "a6f944e064f4"), ("small", "bff3852c02ed"), ("strong", "d50fbf82f364")],
)
def test_presets_never_change_because_a_record_has_their_name_only(preset: Preset, digest: str) -> None:
    text = json.dumps(asdict(PRESETS[preset]), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest, (
        f"runs store `preset: {preset}` without its values, so other values would change a run that is resumed or "
        "compared; leave the preset as it is and add the new values under a new name"
    )


def test_extras_own_value_counts_also_where_it_is_zero() -> None:
    extras = AugmentConfig(preset="strong", mosaic=0.0, hue=0.25).extras()
    assert (extras.mosaic, extras.hue) == (0.0, 0.25)
    assert extras.affine == PRESETS["strong"].affine


def test_extras_another_preset_on_a_written_config_replaces_the_first_ones_values() -> None:
    config = from_dict(dump(override(Config(), ["data.augment.preset=strong", "data.augment.noise=1"])))
    changed = override(config, ["data.augment.preset=small"]).data.augment.extras()
    assert changed == AugmentConfig(preset="small", noise=1.0).extras()


def test_extras_have_a_setting_each() -> None:
    names = [field.name for field in fields(Extras)]
    assert names == list(AugmentConfig.model_fields)[-len(names) :]
    assert all(AugmentConfig.model_fields[name].default is None for name in names)


@pytest.mark.parametrize("path", [path for path in CONFIGS.glob("*.yaml") if not path.name.startswith("finetune")])
def test_shipped_configs_of_the_paper_add_nothing(path: object) -> None:
    data = load_config(str(path)).data
    assert data.augment.preset == "published"
    assert data.augment.extras() == Extras()
    assert data.balance == 0


def test_describe_augmentation_names_what_is_on() -> None:
    assert describe_augmentation(AugmentConfig()) == "published"
    assert describe_augmentation(AugmentConfig(preset="none", blur=0.5)) == "none, blur 0.5"


@pytest.mark.parametrize(
    "change",
    ["zoom=[2, 1]", "hue=0.6", "mosaic=1.5", "noise_level=200", "paste_boxes=0", "preset=large", "zoom=[0, 1]"],
)
def test_values_out_of_bounds_are_refused_by_name(change: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.augment\.{change.partition('=')[0]}"):
        override(Config(), [f"data.augment.{change}"])

"""Every setting is explained, and `jobs.settings` and docs/settings.md say what the code says."""

import re
import subprocess
import sys

import pytest
from support.paths import ROOT

from jobs import settings, train
from jobs.cli import main
from pipeline.config import Config, Section, flatten
from pipeline.config.reference import as_markdown, as_text, find, groups
from pipeline.errors import ConfigError

RENEW = "python -m jobs.settings --markdown > docs/settings.md"
MEANINGS = {setting.key: setting for group in groups() for setting in group.settings}


def sections(section: type[Section] = Config) -> dict[str, type[Section]]:
    """Every section by its key; the whole config's is empty."""
    found = {"": section}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{name}.{key}".rstrip("."): inner for key, inner in sections(field.annotation).items()}
    return found


def test_reference_lists_every_section_and_setting_once() -> None:
    assert [group.key for group in groups()] == list(dict.fromkeys(group.key for group in groups()))
    assert {group.key for group in groups()} == sections().keys()
    assert sorted(setting.key for group in groups() for setting in group.settings) == sorted(flatten(Config()))


@pytest.mark.parametrize("key", sorted(flatten(Config())))
def test_setting_has_a_meaning_of_one_to_four_sentences(key: str) -> None:
    *parents, leaf = key.split(".")
    field = sections()[".".join(parents)].model_fields[leaf]
    assert field.description, f"{key} has no docstring under it in pipeline/config/"
    assert field.description.endswith("."), f"the meaning of {key} ends without a full stop"
    sentences = re.split(r"(?<=[.;:]) +", " ".join(field.description.split()))
    assert max(len(sentence.split()) for sentence in sentences) <= 25, f"a sentence about {key} is too long"
    assert len(re.split(r"(?<=\.) +", " ".join(field.description.split()))) <= 4, f"too many sentences about {key}"


@pytest.mark.parametrize("key", sorted(flatten(Config())))
def test_names_in_a_meaning_are_settings_or_values(key: str) -> None:
    """A renamed setting must be renamed where others mention it."""
    known = flatten(Config()).keys() | sections().keys()
    for name in re.findall(r"`([a-z_.]+)(?::[^`]*)?`", MEANINGS[key].meaning):
        if "." in name and not name.startswith("jobs."):
            assert name in known, f"{key} mentions {name}"


@pytest.mark.parametrize("key", sections())
def test_section_has_a_meaning(key: str) -> None:
    assert (sections()[key].__doc__ or "").strip().endswith(".")


@pytest.mark.parametrize(
    ("key", "kind", "bounds", "default"),
    [
        ("optim.lr", "number", "above 0, at most 1000", "0.0002"),
        ("optim.betas", "[number, number]", "at least 0, below 1", "[0.9, 0.999]"),
        ("optim.schedule", "`step` or `cosine`", "", "step"),
        ("data.augment.scales", "list of integers", "1 to 65535", str([*range(480, 801, 32)])),
        ("data.cache_dir", "path or URL", "", '""'),
        ("train.max_steps", "integer or null", "1 to 2147483647", "null"),
        ("train.compile", "true or false", "", "false"),
        ("scaling.use_gpu", "true or false or `auto`", "", "auto"),
        ("scaling.cpus_per_worker", "number", "0.001 to 10000", "1"),
        ("tracking.experiment", "text", "not empty, at most 500 characters", "deformable-detr"),
    ],
)
def test_reference_of_a_setting_says_type_bounds_and_default(key: str, kind: str, bounds: str, default: str) -> None:
    found = MEANINGS[key]
    assert (found.kind, found.bounds, found.default) == (kind, bounds, default)


def test_command_without_key_prints_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(settings.build_parser(), settings.run, []) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {key}: " in printed for key in flatten(Config()))


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("optim.lr", ["optim.lr"]),
        ("seed", ["seed"]),
        ("data", [key for key in flatten(Config()) if key.startswith("data.")]),
        ("model.backbone", [key for key in flatten(Config()) if key.startswith("model.backbone.")]),
    ],
)
def test_command_with_a_key_prints_that_alone(key: str, wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(settings.build_parser(), settings.run, [key]) == 0
    assert re.findall(r"^  ([a-z0-9_.]+): ", capsys.readouterr().out, re.MULTILINE) == wanted


@pytest.mark.parametrize(
    ("wrong", "meant"), [("optim.lrr", "optim.lr"), ("optm", "optim"), ("lr", "optim.lr"), ("augment", "data.augment")]
)
def test_command_with_a_mistyped_key_exits_2_and_names_the_nearest(
    wrong: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(settings.build_parser(), settings.run, [wrong]) == 2
    assert f"'{meant}'" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        find(wrong)


@pytest.mark.parametrize("key", ["search.samples", "search", "space"])
def test_command_with_a_key_of_a_sweep_says_where_it_is_described(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(settings.build_parser(), settings.run, [key]) == 2
    said = capsys.readouterr().err
    assert f"{key}: no such setting or section; it belongs to the space file of a sweep" in said
    assert "docs/sweeps.md" in said


def test_help_of_a_training_points_to_the_settings() -> None:
    assert "\n  python -m jobs.settings [KEY]" in train.build_parser().format_help()


def test_text_and_page_have_the_same_settings() -> None:
    assert set(re.findall(r"^\| `([a-z0-9_.]+)` \|", as_markdown(groups()), re.MULTILINE)) == flatten(Config()).keys()
    assert as_text(find("seed")).count("\n") < 10


def test_page_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.settings", "--markdown"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == done.stdout, f"docs/settings.md is not what pipeline/config/ says; renew it: {RENEW}"

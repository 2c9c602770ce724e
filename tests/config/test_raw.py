"""Raw YAML values: text fields keep what was written, all other fields get YAML 1.2's value."""

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipeline.config import Config, Section, dump_yaml, from_dict, load_config, override
from pipeline.config.raw import MAX_VALUES, Argument, field_type, parse_yaml, plain, settle

WORDS = ("on", "yes", "null", "~", "007", "0x1F", "1e-4", "2024-05-01", "1:30", "1_000", "[", "a: b", "#1", "'q'", "")
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"])  # neither half of a pair nor a control character
TEXT = st.one_of(st.sampled_from(WORDS), st.text(CHARACTERS))


class Inner(Section):
    name: str = ""
    flag: bool = False


class Kinds(Section):
    """One field of every kind that the rule speaks of."""

    text: str = ""
    named: Annotated[str, Field(min_length=1)] = "x"
    choice: Literal["on", "1"] = "on"
    number: Literal[0, 1] = 0
    optional_text: str | None = None
    number_or_text: int | str = 0
    bounded_or_text: Annotated[int, Field(ge=1)] | str = 1
    word_or_text: Literal["a"] | str = "a"
    flag_or_word: bool | Literal["auto"] = "auto"
    optional_int: int | None = None
    texts: tuple[str, ...] = ()
    mixed: tuple[str, int] = ("", 0)
    table: dict[str, str] = Field(default_factory=dict)
    optional_texts: tuple[str, ...] | None = None
    inner: Inner = Inner()
    anything: Any = None


def settled(key: str, raw: Any) -> Any:
    faults: list[str] = []
    value = settle({key: raw}, Kinds, "", faults)[key]
    assert faults == []
    return value


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        *(("text", word, word) for word in WORDS),
        ("named", "007", "007"),
        ("choice", "on", "on"),
        ("choice", "1", "1"),
        ("number", "1", 1),
        ("optional_text", "null", None),
        ("optional_text", "on", "on"),
        ("optional_text", "007", "007"),
        ("optional_text", "", ""),
        ("number_or_text", "007", 7),
        ("number_or_text", "7.0", "7.0"),
        ("number_or_text", "on", "on"),
        ("number_or_text", "[", "["),
        ("bounded_or_text", "0", "0"),
        ("word_or_text", "[1]", "[1]"),
        ("flag_or_word", "true", True),
        ("flag_or_word", "auto", "auto"),
        ("optional_int", "null", None),
        ("optional_int", "0o17", 15),
        ("texts", "[on, 007, 2024-05-01, '1', null]", ["on", "007", "2024-05-01", "1", None]),
        ("mixed", "[007, 007]", ["007", 7]),
        ("table", "{a: on, 1: 1e-4}", {"a": "on", "1": "1e-4"}),
        ("optional_texts", "[no]", ["no"]),
        ("optional_texts", "null", None),
        ("inner", "{name: no, flag: true}", {"name": "no", "flag": True}),
    ],
)
def test_argument_is_settled_by_the_type_of_its_field(key: str, typed: str, value: Any) -> None:
    found = settled(key, Argument(typed))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("007", 7),
        ("0o17", 15),
        ("0x1f", 31),
        ("1e-4", 1e-4),
        ("-.5E+1", -5.0),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-05-01", "2024-05-01"),
        ("True", True),
        ("tRue", "tRue"),
        ("~", None),
        ("'7'", "7"),
        ("!!int '7'", 7),
        ("!!str 7", "7"),
    ],
)
def test_scalar_without_a_known_field_is_yaml_1_2(written: str, value: Any) -> None:
    found = plain(parse_yaml(written))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "document",
    ["a: 1\na: 2", "&x [*x]", "a: !!binary aGk=", "a: !me 1", "[" * 5000, "a: [", "? [a]\n: 1", "a: 1\n--- 2"],
)
def test_document_that_is_no_config_is_a_yaml_error(document: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(document)


def test_merge_keys_and_aliases_keep_working() -> None:
    tree = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a")
    assert plain(tree) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_merge_of_a_list_takes_the_first_mapping_with_a_key() -> None:
    tree = parse_yaml("a: &a {x: 1}\nb: &b {x: 2, y: 2, z: 2}\nc: {<<: [*a, *b], z: 3}")
    assert plain(tree)["c"] == {"x": 1, "y": 2, "z": 3}
    for wrong in ("a: &a 1\nb: {<<: *a}", "a: &a {x: 1}\nb: {<<: *a, <<: *a}"):
        with pytest.raises(yaml.YAMLError, match="<<"):
            parse_yaml(wrong)


@pytest.mark.parametrize("use", ["[{}]", "{{<<: [{}]}}", "{{x: [{}]}}"])
def test_nested_aliases_are_refused_before_they_are_expanded(use: str) -> None:
    """Nine aliases in each of nine lists stand for 400 million values."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{k}: &a{k} " + use.format(", ".join([f"*a{k - 1}"] * 9)) for k in range(1, 10)]
    began = time.process_time()
    with pytest.raises(yaml.YAMLError, match=f"{MAX_VALUES:,}"):
        parse_yaml("\n".join(lines))
    assert time.process_time() - began < 5
    assert parse_yaml("\n".join(lines[:4])) is not None


def test_list_for_a_field_of_text_keeps_its_items_for_the_error() -> None:
    assert settled("word_or_text", parse_yaml("[on, 1]")) == ["on", 1]


def test_field_of_any_type_stays_raw() -> None:
    assert settled("anything", Argument("007")) == Argument("007")


def test_argument_that_is_not_yaml_is_a_fault_of_its_key_once() -> None:
    faults: list[str] = []
    settle({"optional_int": Argument("["), "text": Argument("[")}, Kinds, "", faults)
    assert faults == ["optional_int: '[' is not a YAML value"]


@pytest.mark.parametrize(("key", "kind"), [("text", str), ("inner.flag", bool), ("no", object), ("text.no", object)])
def test_field_type_of_a_dotted_key(key: str, kind: Any) -> None:
    assert field_type(Kinds, key) is kind


@given(TEXT)
def test_text_on_the_command_line_is_taken_as_typed(text: str) -> None:
    assert override(Config(), [f"tracking.uri={text}"]).tracking.uri == text


@given(TEXT)
def test_text_survives_its_yaml_form(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    config = from_dict({"tracking": {"uri": text}})
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize("word", ["on", "007", "2024-05-01", "1e-4"])
def test_text_in_a_file_is_taken_as_written(tmp_path: Path, word: str) -> None:
    (tmp_path / "low.yaml").write_text(f"name: {word}\n")
    (tmp_path / "top.yaml").write_text("base: low.yaml\n")
    assert load_config(tmp_path / "top.yaml").name == word

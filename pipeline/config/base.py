"""The base of all config sections, and the types that their fields share."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.errors import ConfigError


class Section(BaseModel):
    """Base of all sections: immutable, strict about names.

    The string under a field says what the setting means; `python -m jobs.settings` and docs/settings.md show it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )


S = TypeVar("S", bound=Section)
# Bounds are wide: they keep out what cannot be meant and what overflows later, as in a wait or in a 32-bit index.
LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Side = Annotated[int, Field(ge=1, le=65_535)]  # pixels; the longest side that a JPEG can have
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Rate = Annotated[float, Field(ge=0, le=1e3)]  # of learning
Minutes = Annotated[float, Field(ge=0, le=1e6)]  # about two years; a wait of more overflows
Auto = Literal["auto"]  # a number that the first start of a run chooses, see `pipeline.launch.sizing.auto`


def resolved(value: int | Auto, key: str) -> int:
    """The number of a setting that may be `auto`. Raises ConfigError while it is."""
    if value == "auto":
        raise ConfigError(f"{key} is auto, which only the start of a training run can resolve; give a number")
    return value


@dataclass(frozen=True)
class LocationMark:
    """Marks a text field as a path or URL.

    Attributes:
        names: words that are never paths.
        pattern: what else may be a name instead, where no such file exists.
    """

    names: tuple[str, ...] = ()
    pattern: str = ""

    def is_name(self, text: str) -> bool:
        """Whether a value is a name, not a path."""
        return text in self.names or bool(re.fullmatch(self.pattern, text) and not os.path.exists(text))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The field's schema, which says what the text is."""
        return {**handler(schema), "format": "name, path or URL" if self.names else "path or URL"}


def _check_location(text: str) -> str:
    """The text with a leading `~` replaced by the home folder."""
    if text.startswith("models:/"):
        raise ValueError("takes no registered model; give the folder of the run that was registered, such as runs/demo")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)", text):
        raise ValueError("is neither a path nor a URL like s3://bucket/folder; write ./ before a name with a colon")
    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    return os.path.expanduser(text)


Location = Annotated[str, AfterValidator(_check_location), LocationMark()]  # a path, an fsspec URL, or empty


def map_locations(section: S, change: Callable[[str], str]) -> S:
    """The section with `change` applied to every path and URL in it and in the sections below; names stay."""
    changed: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            changed[name] = map_locations(value, change)
        marks = [mark for mark in field.metadata if isinstance(mark, LocationMark)]
        if marks and not marks[-1].is_name(value):
            changed[name] = change(value)
    return section.model_copy(update=changed)

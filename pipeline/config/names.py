"""What MLflow's registry takes as the name of a model and as an alias; refused before a training, not after it.

The rules are those of `mlflow.utils.validation` (3.17), without importing MLflow. A name with `@` or a control
character is refused too, because `models:/NAME@ALIAS` could not address it; one with a quote, because a search for its
versions could not.
"""

import re
from posixpath import normpath
from typing import Annotated

from pydantic import AfterValidator

MODEL_NAME_LENGTH = 256  # columns of its database
ALIAS_LENGTH = 255
PREVIOUS = "previous"  # alias of the version that was champion before; see `registry.aliases`


def check_model_name(name: str) -> str:
    """The name itself. Raises ValueError with the rule that it breaks."""
    if not name.strip() or normpath(name) != name or name == "." or name.startswith(".."):
        raise ValueError(f"'{name}' names no model; use letters, digits, '-', '_' and '.'")
    if re.search(r"[/:@'\"\x00-\x1f\x7f-\x9f]", name):
        raise ValueError(f"'{name}' cannot name a model: '/', ':', '@', quotes and control characters are not allowed")
    if len(name) > MODEL_NAME_LENGTH:
        raise ValueError(f"'{name[:20]}...' cannot name a model: it has more than {MODEL_NAME_LENGTH} characters")
    return name


def check_alias(alias: str) -> str:
    """The alias itself. Raises ValueError with the rule that it breaks."""
    if not re.fullmatch(r"[\w-]+", alias):
        raise ValueError(f"'{alias}' cannot be an alias; use letters, digits, '-' and '_'")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ValueError(f"'{alias}' cannot be an alias: 'latest' and 'v' with a number are MLflow's own")
    if len(alias) > ALIAS_LENGTH:
        raise ValueError(f"'{alias[:20]}...' cannot be an alias: it has more than {ALIAS_LENGTH} characters")
    return alias


def check_new_alias(alias: str) -> str:
    """The alias itself, which a version is to get. Raises ValueError also if a promotion keeps its way back there."""
    if alias == PREVIOUS or alias.startswith(f"{PREVIOUS}-"):
        raise ValueError(f"'{alias}' is set by jobs.promote, whose --rollback follows it; give another alias")
    return check_alias(alias)


ModelName = Annotated[str, AfterValidator(lambda name: name and check_model_name(name))]  # or empty
Alias = Annotated[str, AfterValidator(lambda alias: alias and check_new_alias(alias))]  # or empty

"""What the replicas of a server need to know: from the command line or from the `args` of a Serve config file.

Checked before Ray starts. Raises ConfigError, and an InputError if the packages of the extra `serve` are not there.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pydantic import ValidationError

from pipeline.config.base import Section
from pipeline.config.serving import ServingConfig
from pipeline.errors import ConfigError, InputError
from pipeline.serving.guard import token_digest

TOKEN = "DDETR_SERVE_TOKEN"  # the variable
LEAST_TOKEN = 16  # characters
PACKAGES = ("fastapi", "python_multipart", "uvicorn", "watchfiles")  # the last two come with Ray Serve only


class Arguments(Section):
    """A model and how it is served."""

    model: str
    """As `load_detector` takes it."""

    name: str = ""
    """The model's name for clients; empty takes its version, or the last two parts of its path."""

    tracking_uri: str | None = None
    """MLflow store of a registered version."""

    gpu: bool = False
    """Whether a replica has a GPU."""

    needs_token: bool = True
    """Whether a start without a token in the environment is refused."""

    settings: ServingConfig = ServingConfig()
    """Of the server."""


def public_name(arguments: Arguments) -> str:
    """What clients can read; no path of the server."""
    return arguments.name or short_name(arguments.model)


def short_name(model: str) -> str:
    """A version's address, or the last two parts of a path."""
    return model if model.startswith("models:") else "/".join(model.rstrip("/").split("/")[-2:])


def parse_settings(given: Mapping[str, str]) -> ServingConfig:
    """The settings of a server from the values of flags.

    Raises:
        ConfigError: one message with every fault.
    """
    try:
        return ServingConfig.model_validate(dict(given))
    except ValidationError as error:
        found = {f"--{str(fault['loc'][0]).replace('_', '-')}: {fault['msg']}" for fault in error.errors()}
        raise ConfigError("; ".join(sorted(found))) from None


def parse_arguments(given: Mapping[str, Any]) -> Arguments:
    """The `args` of a Serve config file.

    Raises:
        ConfigError: one message with every fault.
    """
    try:
        return Arguments.model_validate(dict(given))
    except ValidationError as error:
        found = [f"args.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError("; ".join(found)) from None


def read_token(needed: bool = False) -> str:
    """`token_digest` of the token in this process's environment; empty if there is none.

    Args:
        needed: whether none is an error.

    Raises:
        ConfigError: there is none but it is needed, or it is not ASCII or too short to be secret.
    """
    token = os.environ.get(TOKEN, "").strip()
    if not token.isascii():  # a header cannot carry it unchanged
        raise ConfigError(f"{TOKEN} has characters other than ASCII; openssl rand -hex 32 makes one")
    if token and len(token) < LEAST_TOKEN:
        raise ConfigError(f"{TOKEN} has less than {LEAST_TOKEN} characters; openssl rand -hex 32 makes one")
    if needed and not token:
        raise ConfigError(
            f"the variable {TOKEN} is not set where the server starts; openssl rand -hex 32 makes a token"
        )
    return token_digest(token) if token else ""


def check_reach(settings: ServingConfig, without_token: bool) -> bool:
    """Refuse a server that others reach without a token; whether it needs one.

    Args:
        settings: of the server.
        without_token: whether everybody may use it.

    Raises:
        ConfigError: with what to do.
    """
    needs_token = not settings.is_local and not without_token
    if needs_token and not read_token():
        raise ConfigError(
            f"--host {settings.host} lets other machines in: set the variable {TOKEN} to a secret token (openssl rand "
            "-hex 32), or say --without-token"
        )
    return needs_token or bool(read_token())


def check_packages() -> None:
    """Raises InputError if the extra `serve` is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise InputError(f"serving needs {', '.join(missing)}: python -m pip install -c constraints.txt -e '.[serve]'")

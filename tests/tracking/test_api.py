"""The types of MLflow's client are those of the MLflow that is installed."""

import inspect
from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from pipeline.tracking.api import TrackingClient

METHODS = [name for name in vars(TrackingClient) if not name.startswith("_")]


def required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty


def call_of(method: Callable[..., object], only_required: bool) -> tuple[list[str], dict[str, str]]:
    """A call that the type allows, by position where it can be, each argument being its own name."""
    given = [p for p in inspect.signature(method).parameters.values() if required(p) or not only_required]
    return [p.name for p in given if p.kind is not p.KEYWORD_ONLY], {
        p.name: p.name for p in given if p.kind is p.KEYWORD_ONLY
    }


@pytest.mark.parametrize("only_required", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_tracking_client_method_call_is_one_that_mlflow_takes(name: str, only_required: bool) -> None:
    positional, keywords = call_of(getattr(TrackingClient, name), only_required)
    bound = inspect.signature(getattr(MlflowClient, name)).bind(*positional, **keywords)
    assert all(bound.arguments[key] == key for key in [*positional, *keywords])


def test_tracking_client_has_the_methods_that_are_used() -> None:
    assert len(METHODS) > 20
    assert {"get_run", "search_runs", "create_model_version"} <= {*METHODS}

"""A promotion in a real store, from the versions to the alias: what moves, what is refused, what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from support.promotions import NAME, PlantedEvaluations, Registry, open_registry

from jobs.promote import build_parser, run
from pipeline.data.index import load_index
from pipeline.errors import CheckpointError, ConfigError, RunError, TrackingInputError
from pipeline.launch import promotion
from pipeline.launch.evaluation_request import check_request
from pipeline.launch.model_evaluation import evaluate_model
from pipeline.launch.promotion import promote
from pipeline.launch.promotion_report import Promotion
from pipeline.launch.promotion_request import PromotionRequest
from pipeline.registry.aliases import MOVE_TAG, Pace, now

SHARES = {"good": 0.5, "better": 0.9, "twin": 0.5, "foreign": 0.9, "elsewhere": 0.9}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A version for each of SHARES; `twin` has the weights of `good`."""
    registry = open_registry(tmp_path_factory.mktemp("registry"))
    registry.add("good", seed=0)
    registry.add("better", seed=1)
    registry.add("twin", seed=0)
    registry.add("foreign", seed=2, classes={1: "plate"})
    registry.add("elsewhere", seed=3, val="other")
    return registry


@pytest.fixture(autouse=True)
def champion(registry: Registry) -> None:
    """`good` is the champion, and `better` wants to be."""
    registry.reset(champion="good", challenger="better")


@pytest.fixture
def planted(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> PlantedEvaluations:
    planted = PlantedEvaluations(registry, SHARES)
    monkeypatch.setattr(promotion, "evaluate_model", planted)
    return planted


def ask(registry: Registry, source: str = "challenger", **changes: Any) -> Promotion:
    request = PromotionRequest(NAME, registry.versions.get(source, source), tracking_uri=registry.uri, draws=20)
    return promote(replace(request, **changes), Pace(settle=600, stale=600, sleep=lambda _: None))


def test_promote_better_version_gets_the_alias_tags_and_artifacts(
    registry: Registry, planted: PlantedEvaluations
) -> None:
    found = ask(registry)
    assert found.verdict == "promoted"
    assert registry.aliases == {"champion": "better", "challenger": "better", "previous": "good"}
    assert sorted(planted.calls) == ["better", "good"]
    tags = registry.tags_of("better")
    assert (tags["verdict"], tags["against"], tags["metric"]) == ("promoted", registry.versions["good"], "val/AP")
    assert found.compared is not None
    difference = found.compared.comparison.metrics["AP"]
    assert difference.value > difference.other + 0.1
    assert float(tags["difference"]) == difference.difference.value
    assert float(tags["difference_low"]) <= float(tags["difference"]) <= float(tags["difference_high"])
    assert tags["data_digest"] == load_index(str(registry.folder / "val")).digest
    assert tags["reason"] == found.reason
    folder = registry.artifacts_of("better") / tags["artifact"]
    document = json.loads((folder / "comparison.json").read_text())
    assert document["verdict"] == "promoted"
    assert document["metrics"]["AP"]["difference"]["value"] == difference.difference.value
    assert tags["reason"].partition(" (")[0] in (folder / "index.html").read_text()
    assert registry.tags_of("good") == {}


def test_promote_worse_version_is_refused_with_kept_results(registry: Registry, planted: PlantedEvaluations) -> None:
    ask(registry)
    planted.calls.clear()
    found = ask(registry, "good")
    assert found.refused
    assert planted.calls == [], "both were evaluated before"
    assert registry.aliases["champion"] == "better"
    assert registry.tags_of("good")["verdict"] == "refused"
    assert registry.tags_of("better")["verdict"] == "promoted"
    assert not ask(registry, "good", min_gain=-1.0, no_class_below=-1.0).refused, "the rules are the caller's"
    assert registry.aliases == {"champion": "good", "challenger": "better", "previous": "better"}
    assert registry.tags_of("good")["verdict"] == "promoted"
    assert planted.calls == []


def test_promote_equal_version_is_refused(registry: Registry, planted: PlantedEvaluations) -> None:
    found = ask(registry, "twin")
    assert found.refused
    assert registry.tags_of("twin")["difference"] == "0.0"
    assert registry.aliases == {"champion": "good", "challenger": "better"}


def test_promote_kept_results_count_only_for_the_same_data_and_settings(
    registry: Registry, planted: PlantedEvaluations
) -> None:
    ask(registry)
    planted.calls.clear()
    ask(registry, "good", overrides=(f"data.val={registry.folder}/other",))
    ask(registry, "good", overrides=("evaluation.flip=true",))
    assert len(planted.calls) == 4
    ask(registry, "good", overrides=("evaluation.backend=pycocotools", "data.workers=0"))
    assert len(planted.calls) == 4, "these change no number"
    for results in registry.artifacts_of("better").rglob("results.json"):
        results.write_bytes(results.read_bytes().replace(b"0.9", b"0.8"))
    ask(registry, "good")
    assert planted.calls[4:] == ["better"], "damaged results count as none"


def test_promote_without_incumbent_compares_nothing(registry: Registry, planted: PlantedEvaluations) -> None:
    found = ask(registry, target="production")
    assert (found.verdict, found.compared, planted.calls) == ("promoted", None, [])
    assert registry.aliases["production"] == "better"
    assert "previous-production" not in registry.aliases
    assert "first version" in registry.tags_of("better")["reason"]


def test_promote_the_champion_itself_changes_nothing(registry: Registry, planted: PlantedEvaluations) -> None:
    assert ask(registry, "good").verdict == "unchanged"
    assert registry.tags_of("good") == {}
    assert planted.calls == []


def test_promote_other_categories_are_refused_and_forced(registry: Registry, planted: PlantedEvaluations) -> None:
    with pytest.raises(ConfigError, match="plate"):
        ask(registry, "foreign")
    assert registry.aliases["champion"] == "good"
    assert registry.tags_of("foreign") == {}
    assert ask(registry, "foreign", force=True).verdict == "promoted"
    assert registry.aliases == {"champion": "foreign", "challenger": "better", "previous": "good"}
    assert "forced" in registry.tags_of("foreign")["reason"]
    assert planted.calls == []


def test_promote_other_data_must_be_named(registry: Registry, planted: PlantedEvaluations) -> None:
    with pytest.raises(ConfigError, match=r"data\.val"):
        ask(registry, "elsewhere")
    assert planted.calls == []
    found = ask(registry, "elsewhere", overrides=(f"data.val={registry.folder}/other",))
    assert found.verdict == "promoted"
    assert found.compared is not None
    assert found.compared.folder == str(registry.folder / "other")


def test_promote_metric_without_objects_is_refused_before_an_evaluation(
    registry: Registry, planted: PlantedEvaluations
) -> None:
    with pytest.raises(ConfigError, match="AP_large"):
        ask(registry, metric="val/AP_large")
    assert planted.calls == []


@pytest.mark.parametrize("damaged", ["better", "good"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_promote_damaged_version_is_named_and_nothing_moves(
    name: str, damaged: str, registry: Registry, planted: PlantedEvaluations
) -> None:
    path = registry.files_of(damaged) / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(CheckpointError, match=f"models:/{NAME}/{registry.versions[damaged]}"):
            ask(registry)
        if damaged == "better":
            with pytest.raises(CheckpointError, match="damaged"):
                ask(registry, force=True)
            registry.client.set_registered_model_alias(NAME, "previous", registry.versions["better"])
            with pytest.raises(CheckpointError, match="damaged"):
                ask(registry, rollback=True)
    finally:
        path.write_bytes(content)
    assert registry.aliases["champion"] == "good"
    assert planted.calls == []


def test_promote_loses_to_one_that_ended_meanwhile(
    registry: Registry, planted: PlantedEvaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(request: Any) -> Any:
        if not planted.calls:  # somebody else is faster
            planted.calls.append("rival")
            assert ask(registry, "twin", force=True).verdict == "promoted"
        return planted(request)

    monkeypatch.setattr(promotion, "evaluate_model", evaluate)
    found = ask(registry)
    assert found.refused
    assert f"version {registry.versions['twin']} (" in found.reason
    assert registry.aliases == {"champion": "twin", "challenger": "better", "previous": "good"}
    tags = registry.tags_of("better")
    assert (tags["verdict"], tags["reason"]) == ("refused", found.reason)
    assert ask(registry).verdict == "promoted", "again, against the new champion"


def test_promote_the_same_version_twice_at_once_keeps_the_tags_of_the_first(
    registry: Registry, planted: PlantedEvaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(request: Any) -> Any:
        if not planted.calls:
            planted.calls.append("rival")
            assert ask(registry).verdict == "promoted"
        return planted(request)

    monkeypatch.setattr(promotion, "evaluate_model", evaluate)
    found = ask(registry)
    assert (found.verdict, found.refused) == ("unchanged", False)
    assert registry.aliases == {"champion": "better", "challenger": "better", "previous": "good"}
    assert registry.tags_of("better")["verdict"] == "promoted"


def test_promote_killed_between_two_evaluations_repeats_none(
    registry: Registry, planted: PlantedEvaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(request: Any) -> Any:
        if planted.calls:
            raise KeyboardInterrupt
        return planted(request)

    monkeypatch.setattr(promotion, "evaluate_model", evaluate)
    with pytest.raises(KeyboardInterrupt):
        ask(registry)
    assert registry.tags_of("better") == {}
    monkeypatch.setattr(promotion, "evaluate_model", planted)
    assert ask(registry).verdict == "promoted"
    assert sorted(planted.calls) == ["better", "good"]


def test_promote_without_permission_for_tags_says_that_the_alias_has_moved(
    registry: Registry, planted: PlantedEvaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise MlflowException("not for you", PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", refuse)
    with pytest.raises(TrackingInputError, match="has moved the alias @champion to models:/mine/2, but did") as raised:
        ask(registry)
    assert raised.value.exit_code == 1, "something was started"
    assert registry.aliases["champion"] == "better"
    registry.reset(champion="better", challenger="good")
    with pytest.raises(TrackingInputError, match=r"\) did not take the tags"):
        ask(registry)
    assert registry.aliases["champion"] == "better"


def test_promote_rollback_goes_back_and_forth(registry: Registry, planted: PlantedEvaluations) -> None:
    with pytest.raises(RunError, match="previous"):
        ask(registry, rollback=True)
    ask(registry)
    found = ask(registry, rollback=True)
    assert found.verdict == "rolled back"
    assert registry.aliases == {"champion": "good", "challenger": "better", "previous": "better"}
    assert registry.tags_of("better")["verdict"] == "rolled back"
    assert "artifact" not in registry.tags_of("better"), "no tag of the promotion is left"
    ask(registry, rollback=True)
    assert registry.aliases["champion"] == "better"


def test_promote_rollback_after_a_killed_promotion_goes_to_the_version_before_it(
    registry: Registry, planted: PlantedEvaluations
) -> None:
    """The kill came after the write of the alias and before that of `previous`."""
    registry.reset(champion="better", challenger="better", previous="twin")
    good, better = registry.versions["good"], registry.versions["better"]
    claim = {"id": "dead", "version": better, "before": good, "by": "somebody@host", "at": now(), "done": False}
    registry.client.set_registered_model_tag(NAME, f"{MOVE_TAG}champion", json.dumps(claim))
    request = PromotionRequest(NAME, tracking_uri=registry.uri, rollback=True)
    assert promote(request, Pace(settle=0.2, stale=0.5)).verdict == "rolled back"
    assert registry.aliases == {"champion": "good", "challenger": "better", "previous": "better"}


def test_promote_rollback_to_the_champion_itself_says_what_to_do(registry: Registry) -> None:
    registry.reset(champion="good", previous="good", production="good")
    registry.client.set_registered_model_alias(NAME, "previous-production", registry.versions["good"])
    with pytest.raises(RunError, match=rf"jobs\.promote {NAME} --from VERSION --force$"):
        ask(registry, rollback=True)
    with pytest.raises(RunError, match="--force --to production"):
        ask(registry, rollback=True, target="production")


def test_promote_unknown_names_list_the_existing_ones(registry: Registry) -> None:
    with pytest.raises(RunError, match=NAME):
        promote(PromotionRequest("nobody", tracking_uri=registry.uri))
    with pytest.raises(RunError, match="@champion"):
        ask(registry, "rival")
    with pytest.raises(RunError, match="nothing to roll back"):
        ask(registry, target="production", rollback=True)


def test_promote_evaluates_as_jobs_evaluate_does(registry: Registry, tmp_path: Path) -> None:
    """Without planted results: the command, its exit code and its numbers."""
    out = tmp_path / "numbers.json"
    few = "evaluation.max_images=4"
    arguments = [NAME, "--json", str(out), "--tracking-uri", registry.uri, few]
    assert run(build_parser().parse_intermixed_args(arguments)) == 3, "neither has learned anything"
    document = json.loads(out.read_text())
    assert document["data"]["images"] == 4
    for key, name in (("value", "better"), ("other", "good")):
        uri = f"models:/{NAME}/{registry.versions[name]}"
        expected = evaluate_model(check_request(uri, [few], tracking_uri=registry.uri)).result.scores.metrics
        assert {metric: each[key] for metric, each in document["metrics"].items()} == expected

"""The promotion that `jobs.promote` makes: two versions evaluated on the same data, a decision, an alias that moves.

What is wrong with the versions or the data is an InputError before anything is evaluated, with nothing written. The
comparison is written first, then the alias moves, then the version gets its tags. So a promotion that is killed can be
started again, and evaluates nothing twice.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.checkpoint import TrainState
from pipeline.config import Config, flatten, from_record
from pipeline.data.index import ShardIndex, load_index
from pipeline.data.loader import open_dataset
from pipeline.data.plan import evaluated_samples
from pipeline.data.sharding.diff import list_category_differences
from pipeline.errors import ConfigError, RunError, ShardError, after_start
from pipeline.evaluation.analysis.analyse import compare
from pipeline.evaluation.coco import coco_ap, ground_truth
from pipeline.evaluation.detections import Detections, concatenate
from pipeline.evaluation.evaluator import PUBLISHED_TOP_K
from pipeline.files.scratch import scratch_folder
from pipeline.launch.evaluation_request import NEUTRAL, OPEN, EvaluationRequest
from pipeline.launch.evaluation_request import check_request as check_evaluation
from pipeline.launch.model_evaluation import evaluate_model
from pipeline.launch.promotion_report import TAGS, Compared, Promotion, as_page, as_tags, as_tree
from pipeline.launch.promotion_request import PromotionRequest
from pipeline.logs import get_logger
from pipeline.registry.aliases import CHAMPION, Pace, move_alias, now, previous_alias, read_previous, who
from pipeline.registry.decision import Rules, ValidationData, choose_folder, decide
from pipeline.registry.kept_results import EvaluationKey, checkpoint_digest, keep_results, load_results
from pipeline.registry.register import find_model
from pipeline.registry.versions import Version, open_files, read_version
from pipeline.tracking.api import RegisteredModel, TrackingClient
from pipeline.tracking.client import connect, mlflow_faults
from pipeline.tracking.store import TrackingStore, choose_store

ARTIFACTS = "promotion"  # among the artifacts of a version's run
SUBSET = "evaluation.max_images"

log = get_logger("promotion")


@dataclass(frozen=True)
class _Store:
    """An MLflow store that answers."""

    store: TrackingStore
    client: TrackingClient


@dataclass(frozen=True)
class _Side:
    """One of two versions, with its files."""

    version: Version
    folder: Path
    state: TrainState

    @property
    def recorded(self) -> Config:
        return from_record(self.state.config, self.version.uri)


def promote(request: PromotionRequest, pace: Pace | None = None) -> Promotion:
    """Compare a version with the one in use, and give it the alias if it is better.

    Args:
        request: checked by `promotion_request.check_request`.
        pace: for tests.

    Raises:
        InputError: a version does not exist, is damaged, or cannot be compared; nothing was changed.
        TrackingError: MLflow does not answer.
        PipelineError: an evaluation failed.
    """
    store = choose_store(request.tracking_uri)
    place = _Store(store, connect(store))
    with mlflow_faults(store, f"did not promote a version of {request.name}"), ExitStack() as stack:
        model = find_model(place.client, request.name)
        holder = model.aliases.get(request.target)
        before = None if holder is None else read_version(place.client, model, str(holder))
        source = request.source
        if request.rollback:
            source = _version_to_go_back_to(request, model, before)
        version = read_version(place.client, model, source)
        found = Promotion(request, version, before, "promoted", "", who(), now())
        if before is not None and before.number == version.number:
            reason = f"{version.shown} has the alias @{request.target} already; nothing was compared"
            return replace(found, verdict="unchanged", reason=reason)
        ours = _Side(version, *stack.enter_context(open_files(version, store)))
        if request.rollback:
            with after_start():
                return _roll_back(place, found, pace)
        if before is None:
            reason = f"the first version with the alias @{request.target}: there was nothing to compare it with"
        elif request.force:
            reason = "forced (--force): nothing was compared"
        else:
            theirs = _Side(before, *stack.enter_context(open_files(before, store)))
            compared = _compare(place, request, ours, theirs)
            found = replace(found, compared=compared, reason=compared.decision.reason)
            with after_start():
                found = replace(found, artifact=_write_comparison(place, found, compared))
                if not compared.decision.passed:
                    return _finish(place, replace(found, verdict="refused"))
            reason = found.reason
        with after_start():
            return _finish(place, _move(place, replace(found, reason=reason), pace))


def _version_to_go_back_to(request: PromotionRequest, model: RegisteredModel, before: Version | None) -> str:
    """Number of the version that had the alias before; the alias `previous` if there is none, for its message."""
    if before is None:
        raise RunError(f"models:/{request.name} has no @{request.target}, so there is nothing to roll back")
    number = read_previous(model, request.target)
    if number == before.number:  # MLflow's pages can make it so
        raise RunError(
            f"@{previous_alias(request.target)} is {before.uri}, which has the alias @{request.target} already; "
            f"to go back to another version: python -m jobs.promote {request.name} --from VERSION --force"
            + ("" if request.target == CHAMPION else f" --to {request.target}")
        )
    return number or previous_alias(request.target)


def _move(place: _Store, found: Promotion, pace: Pace | None) -> Promotion:
    """Give the version the alias, unless it has moved since the command began."""
    request = found.request
    expected = found.before.number if found.before else None
    winner = move_alias(place.client, request.name, request.target, found.version.number, expected, pace)
    if winner is None:
        return found
    if str(find_model(place.client, request.name).aliases.get(request.target)) == found.version.number:
        reason = f"{found.version.uri} got the alias @{request.target} from another promotion meanwhile: {winner}"
        return replace(found, verdict="unchanged", reason=reason)
    reason = (
        f"@{request.target} was moved by somebody else meanwhile, to {winner}; run the same command again to compare "
        f"with that (before: {found.reason})"
    )
    return replace(found, verdict="refused", reason=reason)


def _roll_back(place: _Store, found: Promotion, pace: Pace | None) -> Promotion:
    """Give the alias back to the version that had it before; the version that loses it gets the tags."""
    assert found.before is not None, "checked by the caller"
    alias, lost = found.request.target, found.before
    moved = _move(place, replace(found, verdict="rolled back", reason=f"{found.version.uri} is @{alias} again"), pace)
    if moved.verdict == "rolled back":
        _set_tags(place, lost, replace(moved, before=found.version))
    return moved


def _finish(place: _Store, found: Promotion) -> Promotion:
    if found.verdict != "unchanged":  # then the version has the tags of the promotion that moved the alias
        _set_tags(place, found.version, found)
    return found


def _set_tags(place: _Store, version: Version, found: Promotion) -> None:
    """Replace the tags of an earlier promotion of the version. An error says that the alias has moved, if it has."""
    client, name, number, tags = place.client, version.name, version.number, as_tags(found)
    done = "" if found.refused else f"has moved the alias @{found.request.target} to {found.version.uri}, but "
    with mlflow_faults(place.store, f"{done}did not take the tags of {version.uri}"):
        for key in version.tags:
            if key.startswith(TAGS) and key not in tags:
                client.delete_model_version_tag(name, number, key)
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)


def _write_comparison(place: _Store, found: Promotion, compared: Compared) -> str:
    """Log the page and the numbers in the version's run; returns the folder among its artifacts."""
    version, before = found.version, found.before
    if version.run is None or before is None:
        log.warning("the MLflow run of %s is deleted, so the comparison is not kept there", version.uri)
        return ""
    folder = f"{ARTIFACTS}/{version.name}-{version.number}-against-{before.number}-{compared.digest[:8]}"
    verdict = replace(found, artifact=folder, verdict="promoted" if compared.decision.passed else "refused")
    with scratch_folder("promotion") as scratch:
        (scratch / "index.html").write_text(as_page(verdict, compared), encoding="utf-8")
        (scratch / "comparison.json").write_text(json.dumps(as_tree(verdict), indent=1), encoding="utf-8")
        place.client.log_artifacts(version.run.info.run_id, str(scratch), folder)
    return folder


def _compare(place: _Store, request: PromotionRequest, ours: _Side, theirs: _Side) -> Compared:
    """Evaluate both versions on the same data and decide."""
    _check_categories(ours, theirs)
    folder = request.shards or choose_folder(*(_validation_data(side) for side in (ours, theirs)))
    overrides = [*request.overrides, f"data.val={folder}"]
    if not any(text.startswith(f"{SUBSET}=") for text in overrides):
        overrides.append(f"{SUBSET}=null")  # a quick look in training is no reason for one here
    evaluations = [check_evaluation(str(side.folder), overrides) for side in (ours, theirs)]
    configs = [each.apply(side.recorded) for each, side in zip(evaluations, (ours, theirs), strict=True)]
    data = open_dataset(configs[0].data.val, "data.val", configs[0].data, 1)
    index: ShardIndex = data.index
    if index.categories != ours.state.categories:
        raise ConfigError(f"{index.folder} has other categories than {ours.version.uri} was trained on; set data.val")
    truth = ground_truth(data)
    rows = evaluated_samples(len(data), configs[0].evaluation.max_images)
    images = index.samples.image_id[rows].tolist()
    if coco_ap(truth, concatenate([]), images)[request.number] < 0:
        raise ConfigError(f"--metric {request.metric}: {index.folder} has no object that it counts; choose another one")
    keys = [
        EvaluationKey(checkpoint_digest(side.folder), index.digest, _settings(config))
        for side, config in zip((ours, theirs), configs, strict=True)
    ]
    with after_start():
        first = _detections(place, ours.version, evaluations[0], keys[0])
        # The same weights may be registered twice.
        other = first if keys[1] == keys[0] else _detections(place, theirs.version, evaluations[1], keys[1])
        comparison = compare(truth, first, other, images, draws=request.draws)
    rules = Rules(request.number, request.min_gain, request.no_class_below)
    return Compared(comparison, decide(comparison, rules), index.folder, index.digest, len(images))


def _detections(place: _Store, version: Version, evaluation: EvaluationRequest, key: EvaluationKey) -> Detections:
    """The best detections of each image, those that were kept if there are some."""
    kept = load_results(place.client, place.store, version, key)
    if kept is not None:
        log.info("%s: kept results of an earlier evaluation are used", version.uri)
        return kept
    log.info("evaluating %s", version.uri)
    result = evaluate_model(evaluation).result
    detections = result.detections[result.detections.orders < PUBLISHED_TOP_K]
    keep_results(place.client, place.store, version, key, detections, result.metrics)
    return detections


def _settings(config: Config) -> dict[str, object]:
    """Settings that change the detections of a checkpoint on given data."""
    kept = [key for key in OPEN if not key.startswith(NEUTRAL)]
    flat = flatten(config)
    return {
        key: flat[key] for key in flat if key.startswith(tuple(kept)) and not key.startswith((*NEUTRAL, "data.val"))
    }


def _validation_data(side: _Side) -> ValidationData:
    folder = side.recorded.data.val or ""
    found = ""
    if folder:
        try:
            found = load_index(folder).digest
        except ShardError as error:
            log.warning("the validation data of %s cannot be read: %s", side.version.uri, error)
    return ValidationData(side.version.uri, folder, side.version.val_digest, found)


def _check_categories(ours: _Side, theirs: _Side) -> None:
    names: Sequence[str] = (ours.version.uri, theirs.version.uri)
    if ours.state.categories == theirs.state.categories:
        return
    lines = list_category_differences(names[0], ours.state.categories, names[1], theirs.state.categories)
    raise ConfigError(
        f"{names[0]} and {names[1]} detect different classes, so one cannot be compared with the other ("
        + "; ".join(lines or ["the same ones in another order"])
        + "); --force promotes without a comparison"
    )

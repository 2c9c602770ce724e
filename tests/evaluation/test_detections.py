"""Detections: the same list at any number of ranks, exact files, and errors for those that cannot be scored."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import AnnotationError, DetectionError
from pipeline.evaluation.detections import (
    Detections,
    concatenate,
    find_places,
    from_results_json,
    gather,
    gather_objects,
)
from pipeline.runtime import Runtime, single

IMAGES, CATEGORIES = [5, 9, 12], [1, 3, 7]


def image_detections(image: int, count: int) -> Detections:
    rng = np.random.default_rng(image)
    return Detections(
        np.full(count, image, np.int64),
        np.arange(count, dtype=np.int32),
        rng.choice(CATEGORIES, count),
        rng.uniform(0, 90, (count, 4)).astype(np.float32),
        np.sort(rng.uniform(0, 1, count).astype(np.float32))[::-1],
    )


def some() -> Detections:
    return concatenate(image_detections(image, image) for image in IMAGES)


def equal(a: Detections, b: Detections) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_check_and_sort_any_order_gives_the_same_list() -> None:
    original = some()
    assert equal(original.check_and_sort(IMAGES, CATEGORIES), original)
    for seed in range(5):
        shuffled = original[np.random.default_rng(seed).permutation(len(original))]
        assert equal(shuffled.check_and_sort(IMAGES, CATEGORIES), original)


# What several ranks gather is tested with the evaluator, in one start of their processes.
def test_gather_single_rank_needs_no_process_group() -> None:
    assert gather_objects("item", single()) == ["item"]
    gathered = gather(some(), single())
    assert gathered is not None
    assert equal(gathered, some())


def test_concatenate_no_parts_is_empty(tmp_path: Path) -> None:
    nothing = concatenate([])
    assert len(nothing) == 0
    assert nothing.boxes_xywh.shape == (0, 4)
    assert len(nothing.check_and_sort(IMAGES, CATEGORIES)) == 0
    nothing.to_results_json(tmp_path / "r.json")
    assert len(from_results_json(tmp_path / "r.json")) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["boxes_xywh", "scores"])
def test_check_and_sort_non_finite_values_raise(field: str, value: float) -> None:
    changed = getattr(some(), field).copy()
    changed.reshape(len(changed), -1)[6, 0] = value  # the second detection of image 9
    with pytest.raises(DetectionError, match=r"\b1 .*\(images 9\)"):
        replace(some(), **{field: changed}).check_and_sort(IMAGES, CATEGORIES)


def test_check_and_sort_reports_all_faults_together() -> None:
    with pytest.raises(DetectionError) as raised:
        concatenate([some(), image_detections(9, 2)]).check_and_sort([5, 9], [1, 3])
    for part in ("images 12 are not in", "categories 7 are not in", "images 9 were evaluated more than once"):
        assert part in str(raised.value)


def test_to_results_json_is_canonical_and_exact(tmp_path: Path) -> None:
    path = tmp_path / "made" / "results.json"
    digest = some().to_results_json(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    again = from_results_json(path)
    assert again.boxes_xywh.dtype == np.float64
    assert equal(again, some())  # every float32 came back as the same number
    assert again.to_results_json(path) == digest
    shuffled = some()[np.random.default_rng(1).permutation(len(some()))].check_and_sort(IMAGES, CATEGORIES)
    assert shuffled.to_results_json(path) == digest
    assert set(json.loads(path.read_text())[0]) == {"image_id", "category_id", "bbox", "score"}


def test_from_results_json_keeps_the_files_order(tmp_path: Path) -> None:
    entry = {"category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"image_id": image, **entry} for image in (9, 5, 9, 9, 5)]))
    assert from_results_json(path).orders.tolist() == [0, 0, 1, 2, 1]


GOOD = {"image_id": 5, "category_id": 1, "bbox": [1, 2, 3.5, 4], "score": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "not JSON"),
        ('{"annotations": []}', "hold a dict; COCO results are a list"),
        ("[3]", "entry 0: is a int, not a detection"),
        (json.dumps([GOOD, {k: v for k, v in GOOD.items() if k != "score"}]), "entry 1: has no score"),
        (json.dumps([GOOD | {"image_id": "5"}]), "image_id '5' is not a whole number"),
        (json.dumps([GOOD | {"image_id": 2**70}]), "is not a whole number"),
        (json.dumps([GOOD | {"category_id": True}]), "category_id True is not a whole number"),
        (json.dumps([GOOD | {"bbox": [1, 2, 3]}]), "not four finite numbers"),
        (json.dumps([GOOD | {"bbox": [1, 2, float("nan"), 4]}]), "not four finite numbers"),
        (json.dumps([GOOD | {"bbox": [1, 2, 10**400, 4]}]), "not four finite numbers"),
        (json.dumps([GOOD | {"score": float("inf")}]), "not a finite number"),
        (json.dumps([GOOD | {"score": None}] * 9), "have 9 faulty entries of 9"),
    ],
)
def test_from_results_json_wrong_file_raises(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(AnnotationError) as raised:
        from_results_json(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_from_results_json_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"none\.json"):
        from_results_json(tmp_path / "none.json")


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], int]:
    """Images (id, number of detections) as each rank has evaluated them, in its own order; some ranks have none."""
    counts = draw(st.lists(st.integers(0, 4), max_size=8))
    world = draw(st.integers(1, 5))
    found: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for image in draw(st.permutations(range(len(counts)))):
        found[draw(st.integers(0, world - 1))].append((image, counts[image]))
    return found, len(counts)


def gathered(parts: list[Detections]) -> Detections:
    """What rank 0 gets, each rank's part having travelled as torch sends it."""

    def gather_object(item: Detections, items: list[Any], dst: int) -> None:
        items[:] = [pickle.loads(pickle.dumps(part)) for part in (item, *parts[1:])]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "gather_object", gather_object)
        found = gather(parts[0], Runtime(0, len(parts), 0, torch.device("cpu")))
    assert found is not None
    return found


@settings(deadline=None, max_examples=60)
@given(shares())
def test_gather_any_ranks_have_any_images_gives_the_same_bytes(
    drawn: tuple[list[list[tuple[int, int]]], int],
) -> None:
    ranks, images = drawn
    parts = [concatenate(image_detections(*image) for image in rank) for rank in ranks]
    alone = concatenate(image_detections(*image) for image in sorted(image for rank in ranks for image in rank))
    ordered = gathered(parts).check_and_sort(range(images), CATEGORIES)
    assert equal(ordered, alone)
    assert [column.dtype for column in vars(ordered).values()] == [column.dtype for column in vars(alone).values()]
    with TemporaryDirectory() as folder:
        digests = [found.to_results_json(Path(folder) / name) for found, name in ((ordered, "a"), (alone, "b"))]
        assert digests[0] == digests[1]
        assert (Path(folder) / "a").read_bytes() == (Path(folder) / "b").read_bytes()


@pytest.mark.parametrize("known", [[], [0], [3, 7, 9], [3, 2**62]])
def test_find_places_unknown_ids_are_minus_one(known: list[int]) -> None:
    ids = [-(2**62), -1, 0, 3, 4, 7, 9, 10, 2**61, 2**62, 2**63 - 1]
    places = find_places(np.array(ids, np.int64), np.array(known, np.int64))
    assert places.tolist() == [known.index(each) if each in known else -1 for each in ids]


@pytest.mark.parametrize("named", ["photos/b.jpg", "https://example.org/B.png?size=1.5", "shards/000000000007.jpg"])
def test_from_results_json_names_that_agree_with_the_annotations(tmp_path: Path, named: str) -> None:
    """Suffixes and folders may differ; a shard's images are named by their ids."""
    path = tmp_path / "r.json"
    path.write_text(
        json.dumps([{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "file_name": named}])
    )
    assert len(from_results_json(path, {7: "train\\b.png"})) == 1
    assert len(from_results_json(path, {8: "other.png"})) == 1  # an unknown id is found when they are scored


def test_from_results_json_ids_of_other_images_raise(tmp_path: Path) -> None:
    """A prediction on a folder numbers its images 1, 2, 3: the AP with other annotations would be wrong, unseen."""
    path = tmp_path / "r.json"
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5, "file_name": "photos/a.jpg"}
    path.write_text(json.dumps([entry]))
    with pytest.raises(DetectionError, match=r"image 1 is photos/a\.jpg here and b\.jpg there"):
        from_results_json(path, {1: "b.jpg", 2: "a.jpg"})

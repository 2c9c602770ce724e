"""The evaluator scores each image once, with the model's outputs, equally at every world size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distributed import run_ranks
from torch import Tensor, nn

from pipeline.config import AugmentConfig, DataConfig, EvaluationConfig, TrainConfig
from pipeline.data.batch import Batch
from pipeline.data.loader import EvalLoader
from pipeline.data.sharding.shards import build_shards
from pipeline.data.sharding.synthetic import write_synthetic
from pipeline.errors import DetectionError
from pipeline.evaluation.coco import METRICS, coco_ap, ground_truth
from pipeline.evaluation.detections import from_results_json
from pipeline.evaluation.evaluator import Evaluator, Result, build_evaluator
from pipeline.evaluation.tta import eval_sizes_of
from pipeline.runtime import Runtime, single

TRAIN = TrainConfig(micro_batch=2, global_batch=2)
ONE_VIEW = EvaluationConfig()
FOUR_VIEWS = EvaluationConfig(scales=(64, 96), flip=True)
LABELS = 91


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("val")
    for name, images in (("nine", 9), ("two", 2)):
        annotations, drawn = write_synthetic(folder / f"drawn_{name}", images=images, seed=4)
        build_shards(annotations, drawn, folder / name)
    return folder


def data_config(folder: Path, labels: Any = "contiguous") -> DataConfig:
    return DataConfig(val=str(folder), labels=labels, workers=0, augment=AugmentConfig(eval_size=96, max_size=160))


class Watched:
    """An EvalLoader that shows the batch it has just handed out, and can lose or repeat the first one."""

    def __init__(self, loader: EvalLoader, repeats: int = 1) -> None:
        self.index, self.data, self.eval_sizes = loader.index, loader.data, loader.eval_sizes
        self.images, self.groups = loader.images, loader.groups
        self._loader, self._repeats = loader, repeats
        self.current: Batch | None = None

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for place, batch in enumerate(self._loader):
            for _ in range(self._repeats if place == 0 else 1):
                self.current = batch
                yield batch


class Oracle(nn.Module):
    """Answers with the targets of the batch at hand, and with nonsense of label `decoy` at a higher score."""

    def __init__(self, loader: Watched, decoy: int | None = None) -> None:
        super().__init__()
        self.loader, self.decoy = loader, decoy

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        assert not self.training
        assert not torch.is_grad_enabled()
        batch = self.loader.current
        assert batch is not None
        logits = torch.full((len(batch), 12, LABELS), -20.0)
        boxes = torch.full((len(batch), 12, 4), 0.5)
        for row, target in enumerate(batch.targets):
            count = len(target["labels"])
            boxes[row, :count] = target["boxes"]
            logits[row, torch.arange(count), target["labels"]] = 4.0
        if self.decoy is not None:
            logits[:, 11, self.decoy] = 8.0
        return {"pred_logits": logits, "pred_boxes": boxes}


class Patches(nn.Module):
    """A fixed function of the pixels, padding included, as a convolutional net is."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(scale * torch.randn(5 + 4, 3, 8, 8, generator=generator) / 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        cells = self.dropout(nn.functional.conv2d(images, self.weight, stride=8)).flatten(2).transpose(1, 2)
        return {"pred_logits": cells[..., :5], "pred_boxes": cells[..., 5:].sigmoid()}


class Brightest(nn.Module):
    """One box of a fixed size around the brightest column."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        columns = nn.functional.avg_pool1d(images.mean((1, 2)), 9, stride=1, padding=4)
        score, place = columns.masked_fill(mask.all(1), -9).max(1)
        boxes = torch.full((len(images), 1, 4), 0.5)
        boxes[:, 0, 0] = (place + 0.5) / (~mask).any(1).sum(1)
        return {"pred_logits": score[:, None, None], "pred_boxes": boxes}


def oracle_result(
    data: DataConfig, decoy: int | None = None, repeats: int = 1, evaluation: EvaluationConfig = ONE_VIEW
) -> Result:
    eval_sizes = eval_sizes_of(evaluation, data.augment)
    loader = Watched(EvalLoader(data, TRAIN.micro_batch, 0, 1, eval_sizes=eval_sizes), repeats)
    evaluator = Evaluator(loader, data, single(), evaluation)  # type: ignore[arg-type]
    result = evaluator.run(Oracle(loader, decoy))
    assert result is not None
    return result


@pytest.mark.parametrize("labels", ["contiguous", "raw"])
@pytest.mark.parametrize("decoy", [None, 2, 90])  # 2 is no category id here, and both are beyond the five labels
def test_run_true_boxes_score_one_and_unknown_labels_are_dropped(shards: Path, labels: str, decoy: int | None) -> None:
    if (labels, decoy) == ("contiguous", 2):
        decoy = 5
    result = oracle_result(data_config(shards / "nine", labels), decoy)
    assert result.metrics["AP"] == pytest.approx(1.0, abs=1e-9)
    assert result.metrics["AR1"] < 1
    assert set(result.detections.category_ids.tolist()) <= {1, 3, 4, 7, 10}


def test_run_keeps_top_100_per_image_in_order(shards: Path) -> None:
    detections = oracle_result(data_config(shards / "nine")).detections
    images, counts = np.unique(detections.image_ids, return_counts=True)
    assert len(images) == 9
    assert counts.max() <= 100
    for image in images:
        mine = detections[detections.image_ids == image]
        assert (np.diff(mine.orders) > 0).all()
        assert (np.diff(mine.scores) <= 0).all()


def test_run_results_file_scores_the_reported_numbers(shards: Path, tmp_path: Path) -> None:
    data = data_config(shards / "nine")
    result = Evaluator(EvalLoader(data, TRAIN.micro_batch, 0, 1), data, single()).run(Patches())
    assert result is not None
    assert result.detections.scores.dtype == np.float32
    result.detections.to_results_json(tmp_path / "results.json")
    assert coco_ap(ground_truth(data.val), from_results_json(tmp_path / "results.json")) == result.metrics


def rank_results(runtime: Runtime, folder: Path) -> list[tuple[dict[str, float], str] | None]:
    results = []
    # five groups, which two ranks share unevenly, and one, which leaves a rank idle
    for name, evaluation in (("nine", ONE_VIEW), ("two", ONE_VIEW), ("nine", FOUR_VIEWS)):
        data = data_config(folder / name)
        result = build_evaluator(data, evaluation, runtime).run(Patches())
        path = folder / f"{name}_{runtime.world}_{evaluation.flip}.json"
        results.append(result and (result.metrics, result.detections.to_results_json(path)))
    return results


def test_run_is_bit_equal_at_one_and_two_ranks(shards: Path) -> None:
    alone = rank_results(single(), shards)
    first, *others = run_ranks(rank_results, 2, shards, shards)
    assert first == alone
    assert others == [[None, None, None]]
    assert alone[0] != alone[2]


def test_run_explicit_default_view_changes_no_bit(shards: Path) -> None:
    data = data_config(shards / "nine")
    spelled = EvaluationConfig(scales=(data.augment.eval_size,))
    usual, same = (build_evaluator(data, e, single()).run(Patches()) for e in (ONE_VIEW, spelled))
    assert usual is not None
    assert same is not None
    assert usual.metrics == same.metrics
    assert usual.detections.to_results() == same.detections.to_results()


def test_run_true_boxes_in_every_view_are_merged(shards: Path) -> None:
    data = data_config(shards / "nine")
    result = oracle_result(data, evaluation=FOUR_VIEWS)
    assert result.metrics["AP"] == pytest.approx(1.0, abs=1e-9)
    objects = [a for a in ground_truth(data.val)["annotations"] if not a["iscrowd"]]
    assert np.count_nonzero(result.detections.scores > 0.5) == len(objects)


def test_run_mirrored_view_finds_the_same_boxes(shards: Path) -> None:
    data = data_config(shards / "nine")
    found = []
    for flip in (False, True):
        evaluation = EvaluationConfig(flip=flip, merge_iou=0.01, top_k=2)
        result = build_evaluator(data, evaluation, single()).run(Brightest())
        assert result is not None
        found.append(result.detections)
    plain, merged = found
    assert plain.image_ids.tolist() == merged.image_ids.tolist()  # both views found the same box, so one is left
    np.testing.assert_allclose(plain.boxes_xywh, merged.boxes_xywh, atol=2)
    left, width = plain.boxes_xywh[:, 0], plain.boxes_xywh[:, 2]  # the box is half as wide as the image
    assert (np.abs(left + width / 2 - width) > 0.2 * width).any()  # not all in the middle, where a flip changes nothing


def test_run_keeps_at_most_top_k_of_an_image(shards: Path) -> None:
    data = data_config(shards / "nine")
    for evaluation in (EvaluationConfig(top_k=7), EvaluationConfig(top_k=7, flip=True)):
        result = build_evaluator(data, evaluation, single()).run(Patches())
        assert result is not None
        assert np.unique(result.detections.image_ids, return_counts=True)[1].tolist() == [7] * 9


def test_run_view_of_other_images_raises(shards: Path) -> None:
    data = data_config(shards / "nine")
    loader = EvalLoader(data, TRAIN.micro_batch, 0, 1, eval_sizes=eval_sizes_of(FOUR_VIEWS, data.augment))
    evaluator = Evaluator(Watched(loader, repeats=0), data, single(), FOUR_VIEWS)  # type: ignore[arg-type]
    with pytest.raises(DetectionError, match="view 4"):
        evaluator.run(Patches())


class SoftmaxOracle(Oracle):
    """With the last class as "no object", boxes ever further off, and the worst ones first."""

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Any]:
        outputs = super().forward(images, mask)
        shift = 0.05 * torch.arange(12.0)
        boxes = outputs["pred_boxes"] * (1 + shift[:, None])
        logits = outputs["pred_logits"] - shift[:, None] * outputs["pred_logits"].sign()
        return {"pred_logits": logits.flip(1), "pred_boxes": boxes.flip(1), "softmax": True}


def test_run_softmax_head_is_stored_best_first_with_the_same_scores(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_config(shards / "nine")
    loader = Watched(EvalLoader(data, TRAIN.micro_batch, 0, 1))
    evaluator = Evaluator(loader, data, single())  # type: ignore[arg-type]
    ordered = evaluator.run(SoftmaxOracle(loader))
    monkeypatch.setattr("pipeline.evaluation.evaluator.sort_by_score", lambda found: found)
    as_published = evaluator.run(SoftmaxOracle(loader))
    assert ordered is not None
    assert as_published is not None
    assert ordered.metrics == as_published.metrics
    assert 0.1 < ordered.metrics["AP"] < 1
    for result, is_sorted in ((ordered, True), (as_published, False)):
        rows = result.detections.image_ids == result.detections.image_ids[0]
        assert (np.diff(result.detections[rows].scores) <= 0).all() == is_sorted


@pytest.mark.parametrize(("repeats", "counts"), [(0, r" 9 .*\b2\b.*\b0\b"), (2, r" 9 .*\b0\b.*\b2\b")])
def test_run_lost_or_repeated_image_raises(shards: Path, repeats: int, counts: str) -> None:
    with pytest.raises(DetectionError, match=counts):
        oracle_result(data_config(shards / "nine"), repeats=repeats)


def test_run_restores_modes_and_gradients(shards: Path) -> None:
    data = data_config(shards / "two")
    model = Patches().train()
    model.dropout.eval()  # somebody froze this one
    evaluator = Evaluator(EvalLoader(data, TRAIN.micro_batch, 0, 1), data, single())
    first, second = evaluator.run(model), evaluator.run(model)
    assert first is not None
    assert second is not None
    assert first.metrics == second.metrics
    assert (model.training, model.dropout.training, torch.is_grad_enabled()) == (True, False, True)
    state = torch.get_rng_state()
    evaluator.run(model)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(DetectionError, match=r"\(images "):
        evaluator.run(Patches(scale=float("nan")))


def test_run_top_300_keeps_the_published_numbers_and_adds_its_own(shards: Path) -> None:
    data = data_config(shards / "nine")
    at_100, at_300 = (build_evaluator(data, EvaluationConfig(top_k=k), single()).run(Patches()) for k in (100, 300))
    assert at_100 is not None
    assert at_300 is not None
    assert len(at_300.detections) > len(at_100.detections)
    assert at_300.scores.arrays.differences(at_100.scores.arrays) == []
    assert at_100.metrics.items() <= at_300.metrics.items()
    added = set(at_300.metrics) - set(METRICS)
    assert added == {f"{name}_top300" for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR")} | {
        f"AR_{size}_top300" for size in ("small", "medium", "large")
    }
    assert at_300.metrics["AR_top300"] >= at_300.metrics["AR100"]


def rank_subset(runtime: Runtime, shards: Path) -> tuple[dict[str, float], list[Any]] | None:
    result = build_evaluator(data_config(shards / "nine"), EvaluationConfig(max_images=4), runtime).run(Patches())
    return (result.metrics, result.detections.to_results()) if result else None


def test_run_max_images_scores_a_subset_and_says_so(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = data_config(shards / "nine")
    subset = rank_subset(single(), shards)
    assert "4 of 9 images" in caplog.text
    assert subset is not None
    assert subset[0]["images"] == 4
    assert run_ranks(rank_subset, 2, shards, shards) == [subset, None]
    whole = build_evaluator(data, EvaluationConfig(max_images=9), single()).run(Patches())
    assert whole is not None
    assert "images" not in whole.metrics
    kept = {entry["image_id"] for entry in subset[1]}
    of_kept = [entry for entry in whole.detections.to_results() if entry["image_id"] in kept]
    assert subset[1] == of_kept
    found = whole.detections[np.isin(whole.detections.image_ids, list(kept))]
    assert coco_ap(ground_truth(data.val), found, kept) == {name: subset[0][name] for name in METRICS}

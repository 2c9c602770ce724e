"""Two models of which one is better by construction, on images of one population."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.detections import Detections
from support.detection_sets import Row, detections_of, truth_of


@dataclass(frozen=True)
class Population:
    """How images and detections come about; the second model finds less and shifts more."""

    images: int
    categories: int = 3
    objects: float = 3.0  # mean of an image
    found: tuple[float, float] = (0.8, 0.74)  # share of objects, of both models
    shift: tuple[float, float] = (0.05, 0.06)  # standard deviation of a box's sides, relative
    wrong: float = 1.0  # mean of an image


def draw_pair(population: Population, seed: int) -> tuple[dict[str, Any], Detections, Detections]:
    """Ground truth and the detections of the better and the other model, which are alike on the same objects."""
    random = np.random.default_rng(seed)
    objects: list[tuple[int, int, list[float]]] = []
    rows: tuple[list[Row], list[Row]] = ([], [])
    for image in range(1, population.images + 1):
        difficulty = random.normal(0, 0.5)
        for _ in range(random.poisson(population.objects)):
            box = [*random.uniform(0, 500, 2), *np.exp(random.uniform(2.5, 5.3, 2))]
            category = int(random.integers(population.categories)) + 1
            objects.append((image, category, box))
            luck, noise, score = random.random(), random.normal(0, 1, 4), random.normal(1.5, 1)
            for own, share, shift in zip(rows, population.found, population.shift, strict=True):
                if luck < share:
                    scale = np.array([box[2], box[3], box[2], box[3]])
                    shifted = np.array(box) + shift * scale * (noise + random.normal(0, 0.3, 4))
                    own.append((image, category, shifted.tolist(), _score(score - difficulty, random)))
        for _ in range(random.poisson(population.wrong)):
            box = [*random.uniform(0, 500, 2), *np.exp(random.uniform(2.5, 5.3, 2))]
            category = int(random.integers(population.categories)) + 1
            score = random.normal(-1, 1) + difficulty
            for own in rows:
                own.append((image, category, box, _score(score, random)))
    truth = truth_of(objects, population.images, population.categories)
    return truth, detections_of(rows[0]), detections_of(rows[1])


def _score(logit: float, random: np.random.Generator) -> float:
    return float(1 / (1 + np.exp(-logit - random.normal(0, 0.2))))

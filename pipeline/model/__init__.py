"""Deformable DETR and its training criterion: `build_model(config.model)`, `build_criterion(config.loss)`.

Used by engine, evaluation and prediction, which need no other name from here besides `postprocess` and `weights`.
"""

from pipeline.model.deformable import DeformableDETR, build_model
from pipeline.model.losses import SetCriterion, build_criterion

__all__ = ["DeformableDETR", "SetCriterion", "build_criterion", "build_model"]

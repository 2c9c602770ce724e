"""The detectors and their criteria: `build_model(config.model)`, `build_criterion(config.loss)`."""

from pipeline.model.baselines.base import OwnLosses
from pipeline.model.build import build_criterion, build_model
from pipeline.model.deformable import DeformableDETR
from pipeline.model.detector import Detector
from pipeline.model.detr import DETR
from pipeline.model.losses import SetCriterion

__all__ = ["DETR", "DeformableDETR", "Detector", "OwnLosses", "SetCriterion", "build_criterion", "build_model"]

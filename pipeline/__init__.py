"""The library behind `jobs/` and `tune/`: data, model, engine, evaluation, tracking, registry.

`from pipeline import load_detector` is for use of a trained model in other programs. Importing the package alone is
free: no torch, no Ray, no CUDA. A public name loads its module when it is first asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.inference.detections import ImageDetections
    from pipeline.inference.predictor import Predictor
    from pipeline.registry.load import load_detector

__version__ = "0.2.0"
__all__ = ["ImageDetections", "Predictor", "__version__", "load_detector"]

_MODULES = {
    "ImageDetections": "pipeline.inference.detections",
    "Predictor": "pipeline.inference.predictor",
    "load_detector": "pipeline.registry.load",
}


def __getattr__(name: str) -> Any:
    """A public name; Python asks only for those that are not defined above. Raises AttributeError for others."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # here, because it is seldom needed

    return getattr(importlib.import_module(_MODULES[name]), name)

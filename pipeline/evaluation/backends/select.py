"""Which package computes AP. A package that is named but not installed is a ConfigError."""

from importlib.metadata import PackageNotFoundError, version

from pipeline.config import ApBackend
from pipeline.errors import ConfigError
from pipeline.evaluation.backends.base import Backend
from pipeline.evaluation.backends.hotcoco import Hotcoco
from pipeline.evaluation.backends.pycocotools import Pycocotools
from pipeline.evaluation.backends.ultrafast import Ultrafast
from pipeline.evaluation.backends.vernier import Vernier


def load_backend(name: ApBackend) -> Backend:
    """The backend of `evaluation.backend`; `auto` is hotcoco, the fastest one, or pycocotools without it.

    Raises:
        ConfigError: the package is not installed.
    """
    if name == "auto":
        return Hotcoco() if is_installed("hotcoco") else Pycocotools()
    if not is_installed(name):
        raise ConfigError(f"evaluation.backend={name} is not installed: python -m pip install {name}, or take auto")
    match name:
        case "pycocotools":
            return Pycocotools()
        case "hotcoco":
            return Hotcoco()
        case "ultrafast-pycocotools":
            return Ultrafast()
        case "vernier":
            return Vernier()


def is_installed(package: str) -> bool:
    """Whether a distribution is installed; it is not imported."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True

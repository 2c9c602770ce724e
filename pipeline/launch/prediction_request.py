"""What may be asked of a prediction over many images, checked before PyTorch and Ray are loaded. Raises InputError."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, ScalingConfig, override
from pipeline.errors import ConfigError, InputError
from pipeline.evaluation.drawing import is_drawing
from pipeline.files.outputs import check_apart, check_output, check_outputs
from pipeline.inference.image_sources import ImageSource, list_images
from pipeline.inference.prediction_output import SUFFIXES, images_file

WORKERS = "scaling.num_workers"
SETTINGS = (WORKERS, "scaling.cpus_per_worker", "scaling.use_gpu", "scaling.wait_minutes", "scaling.max_failures")
HERE = f"{WORKERS}=0"
DRAWINGS = Path("runs/predictions")  # of image files, if nothing else is asked for


@dataclass(frozen=True)
class Pool:
    """Where a prediction runs."""

    scaling: ScalingConfig  # a process on a CPU has its number of threads
    on_actors: bool  # whether workers were asked for; else one process predicts


@dataclass(frozen=True)
class Outputs:
    """What a prediction writes; at least one of them is given."""

    results: Path | None
    drawings: Path | None  # a folder
    suffix: str = ".png"  # of a drawing, or .jpg

    @property
    def parts(self) -> Path:
        """The folder of unfinished work."""
        output = self.results or self.drawings
        assert output is not None, "a prediction has an output"
        return Path(f"{os.path.abspath(output)}.parts")  # also of `.`, which has no name


@dataclass(frozen=True)
class PredictionRequest:
    """A request that is well formed, except for the limits."""

    images: tuple[ImageSource, ...]
    outputs: Outputs | None  # None: a few image files, which are drawn and printed one after the other
    pool: Pool


def check_request(words: Sequence[str], out: Path | None, draw: Path | None, draw_suffix: str) -> PredictionRequest:
    """Check sources, outputs and settings.

    Args:
        words: sources, see `list_images`, and settings `scaling.key=value`.
        out: a results file by its suffix, else a folder of drawings.
        draw: a folder of drawings.
        draw_suffix: `.png` or `.jpg`.

    Raises:
        InputError: a source cannot be read, an output cannot be written or is missing, or a setting is wrong.
    """
    settings = [word for word in words if word.startswith("scaling.") and "=" in word and not os.path.lexists(word)]
    sources = [word for word in words if word not in settings]
    pool = check_pool(settings)
    if not sources:
        raise InputError("give images: files, URLs, folders, globs, archives, shards, or a list")
    is_results = out is not None and out.suffix.lower() in SUFFIXES
    if out is not None and not is_results and draw is not None:
        raise InputError(
            f"--out {out} and --draw {draw} are two folders of drawings; name a results file: --out X.json"
        )
    images = tuple(list_images(sources))
    are_files = [image.name for image in images if image.file] == list(dict.fromkeys(str(Path(s)) for s in sources))
    drawings = draw if is_results or out is None else out
    if are_files and not settings and not is_results and draw is None and draw_suffix == ".png":
        return PredictionRequest(images, None, pool)
    if not is_results and drawings is None:
        if not are_files:
            raise InputError("say what to write: --out FILE.json or FILE.parquet, or --draw FOLDER")
        drawings = DRAWINGS
    outputs = Outputs(out if is_results else None, drawings, draw_suffix)
    _check_outputs(outputs, sources, images)
    return PredictionRequest(images, outputs, pool)


def check_pool(settings: Sequence[str]) -> Pool:
    """The pool; with `scaling.num_workers=0`, or without it, one process predicts.

    Raises:
        ConfigError: another setting, or a wrong value.
    """
    if closed := [text for text in settings if text.partition("=")[0] not in SETTINGS]:
        raise ConfigError(f"{', '.join(closed)}: for a prediction only {', '.join(SETTINGS)} can be set")
    kept = [text for text in settings if text != HERE]
    scaling = override(Config(), kept).scaling
    return Pool(scaling, any(text.startswith(f"{WORKERS}=") for text in kept))


def _check_outputs(outputs: Outputs, sources: Sequence[str], images: Sequence[ImageSource]) -> None:
    """Refuse outputs that cannot be written, or that would be sources of the next call."""
    files = [Path(source) for source in sources if os.path.isfile(source)]
    results = [] if outputs.results is None else [outputs.results, images_file(outputs.results)]
    check_outputs(results, files)
    if outputs.drawings is not None:
        if outputs.drawings.exists() and not outputs.drawings.is_dir():
            raise InputError(f"{outputs.drawings} is not a folder; choose another folder for the drawings")
        check_output(outputs.drawings / "image.png", files)
        real = Path(os.path.realpath(outputs.drawings))
        for source in sources:
            if os.path.isdir(source) and Path(os.path.realpath(source)) in (real, *real.parents):
                raise InputError(f"drawings in {outputs.drawings} would be images of {source}; choose a folder outside")
        drawn = [image for image in images if image.file and Path(os.path.realpath(image.file.path)).parent == real]
        if earlier := next((image.name for image in drawn if image.file and is_drawing(Path(image.file.path))), ""):
            raise InputError(f"{earlier} is a drawing of an earlier call; draw into a folder without sources")
        check_apart([*results, outputs.parts, outputs.drawings / "image.png"])
    if outputs.parts.exists() and not outputs.parts.is_dir():
        raise InputError(f"{outputs.parts}, for unfinished work, is not a folder; choose another --out")

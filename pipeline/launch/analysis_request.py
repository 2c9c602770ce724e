"""What `jobs.analyse` is asked for, and the checks that need neither a model nor data. Imports nothing heavy.

A mistake is an InputError, before anything is loaded or written.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import AnnotationError, ConfigError, InputError
from pipeline.evaluation.analysis.result import NUMBERS, PAGE
from pipeline.files.outputs import check_output
from pipeline.launch.evaluation_request import OPEN, OPEN_KEYS
from pipeline.runs.record import FILE, read_record

DEFAULT_FOLDER = Path("runs/analysis")
STATE = "state.json"  # of a checkpoint; the modules that define its name load PyTorch


@dataclass(frozen=True)
class AnalysisRequest:
    """The arguments of `jobs.analyse`."""

    target: str  # run, version, checkpoint folder or results file
    against: str | None  # the same, to compare with
    annotations: Path | None  # ground truth, if both are results files
    overrides: Sequence[str]  # `key=value`
    out: Path | None
    tracking_uri: str | None
    draws: int

    @property
    def folder(self) -> Path:
        """Where the files go."""
        if self.out is not None:
            return self.out
        return DEFAULT_FOLDER / "-against-".join(map(_short_name, self.sides))

    @property
    def sides(self) -> tuple[str, ...]:
        """What is analysed, then what it is compared with."""
        return (self.target, self.against) if self.against else (self.target,)

    @property
    def shards(self) -> str | None:
        """The value of `data.val=` among the overrides."""
        given = [text.partition("=")[2] for text in self.overrides if text.startswith("data.val=")]
        return given[-1] if given else None


def is_results(side: str) -> bool:
    """Whether `side` is the path of a results file, and not a run, version or checkpoint."""
    return side.endswith(".json") and not side.startswith("models:") and Path(side).name != FILE


def check_request(request: AnalysisRequest) -> None:
    """Refuse arguments that do not fit together, inputs that do not exist, and a folder that cannot be written.

    Raises:
        InputError: what is wrong; a registered version is looked up later.
    """
    closed = [text for text in request.overrides if not text.partition("=")[0].startswith(OPEN)]
    if closed:
        raise ConfigError(f"{', '.join(closed)}: only {OPEN_KEYS} can be set here")
    models = [side for side in request.sides if not is_results(side)]
    annotations = request.annotations
    if annotations and models:
        raise InputError(f"--annotations has no images for {models[0]}; give data.val=SHARDS instead")
    if annotations and request.shards:
        raise InputError("give either --annotations or data.val, not both")
    if annotations and request.overrides:
        raise ConfigError(f"{', '.join(request.overrides)}: settings need a model or data.val, not --annotations")
    if not (annotations or request.shards or models):
        raise InputError(f"{request.target} is a results file; give data.val=SHARDS or --annotations A.json")
    if request.draws < 0:
        raise InputError(f"--draws {request.draws} must be at least 0")
    for side in request.sides:
        _check_exists(side)
    _check_folder(request)


def _check_exists(side: str) -> None:
    """Refuse a results file or a run that is not there. Raises AnnotationError, RunError."""
    if is_results(side):
        if not Path(side).is_file():
            raise AnnotationError(f"there is no results file {side}")
    elif not side.startswith("models:") and not (Path(side) / STATE).is_file():
        read_record(side)


def _short_name(side: str) -> str:
    """A part of a folder's name: letters, digits and `._-` of what is analysed."""
    if side.startswith("models:"):
        name = side.removeprefix("models:")
    else:
        path = Path(side)
        name = path.parent.name if path.name == FILE else path.name.removesuffix(".json")
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "analysis"


def _check_folder(request: AnalysisRequest) -> None:
    out = request.folder
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is not a folder; choose another one")
    if (out / PAGE).exists() and not (out / NUMBERS).exists():
        raise InputError(f"--out {out} has an {PAGE} that is not of an analysis; choose another folder")
    inputs = [Path(side) for side in request.sides if is_results(side)]
    for name in (PAGE, NUMBERS):
        check_output(out / name, [*inputs, *([request.annotations] if request.annotations else [])])

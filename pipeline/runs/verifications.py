"""`<run>/verification.json`: what pycocotools found when it scored an evaluation again, one verdict per step.

A process beside the run writes the file when it is done, perhaps after the end of the run. Readers of
`evaluations.json` put the numbers of a verdict that differs in place of those of the faster package. A damaged file is
a RunError that names it.
"""

import json
from dataclasses import asdict, dataclass

from pipeline.errors import RunError
from pipeline.files.storage import join, read_bytes, write_bytes

FILE = "verification.json"
VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """A comparison of a backend with pycocotools, on the same detections."""

    step: int  # optimizer steps of the weights
    backend: str  # package and version
    reference: str  # pycocotools and its version
    differences: list[str]  # arrays that are not equal to the last bit; empty if all are
    scored: dict[str, float]  # the backend's numbers
    metrics: dict[str, float]  # those of pycocotools, which stand

    @property
    def summary(self) -> str:
        """One line for a tag or the terminal."""
        if not self.differences:
            return f"{self.backend} equals {self.reference} bit by bit"
        return (
            f"{self.backend} differs from {self.reference} in {', '.join(self.differences)}: "
            f"AP {self.scored['AP']!r} is {self.metrics['AP']!r}"
        )


def read_verdicts(folder: str) -> list[Verdict]:
    """The verdicts of the run in `folder` (path or URL) by step; none if there is no file.

    Raises:
        RunError: it is damaged or of another version.
        OSError: the store does not give it.
    """
    path = join(folder, FILE)
    try:
        document = json.loads(read_bytes(path))
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']} instead of {VERSION}")
        return [Verdict(**row) for row in document["verdicts"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged ({error!r}); move it away") from None


def write_verdict(folder: str, verdict: Verdict) -> None:
    """Add a verdict, in place of one of the same step, by rename. Raises RunError and OSError."""
    by_step = {row.step: row for row in (*read_verdicts(folder), verdict)}
    document = {"version": VERSION, "verdicts": [asdict(by_step[step]) for step in sorted(by_step)]}
    write_bytes(join(folder, FILE), json.dumps(document, indent=1).encode())

"""The detections of one image as arrays, and their conversion to what other packages and files take.

`to_supervision` raises an InputError if the package `supervision` is not installed.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.evaluation.drawing import Prediction

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """The K detections of one image, best first."""

    boxes_xyxy: NDArray[np.float32]  # [K, 4] left, top, right, bottom in pixels of the image, which they may exceed
    scores: NDArray[np.float32]  # [K] in [0, 1], descending
    category_ids: NDArray[np.int64]  # [K] ids of the annotation file
    labels: tuple[str, ...]  # K names of the categories
    size: tuple[int, int]  # height and width of the image, turned by its EXIF orientation if that is applied

    def __len__(self) -> int:
        return len(self.scores)

    def __str__(self) -> str:
        """A line for each detection."""
        found = self.to_dict()
        rows = zip(found["boxes"], found["scores"], found["labels"], strict=True)
        return "\n".join(
            f"  {label:<16} {score:.3f}  x {x:7.1f}  y {y:7.1f}  width {width:7.1f}  height {height:7.1f}"
            for (x, y, width, height), score, label in rows
        )

    def to_dict(self) -> Prediction:
        """Plain lists under `boxes` ([x, y, width, height]), `scores`, `labels` and `category_ids`, ready for JSON.

        `jobs.predict --json` and the registered model in MLflow give the same values.
        """
        corners = self.boxes_xyxy.tolist()  # as Python's floats, so that widths are not rounded again
        return Prediction(
            boxes=[[left, top, right - left, bottom - top] for left, top, right, bottom in corners],
            scores=self.scores.tolist(),
            labels=list(self.labels),
            category_ids=self.category_ids.tolist(),
        )

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results: `[{"image_id", "category_id", "bbox": [x, y, width, height], "score"}]`.

        Args:
            image_id: the image's id in the annotation file. If that counts pixels of the image as stored, predict with
                `exif="ignore"`.
        """
        found = self.to_dict()
        return [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(found["category_ids"], found["boxes"], found["scores"], strict=True)
        ]

    def to_supervision(self) -> "supervision.Detections":
        """`supervision.Detections`: `class_id` are the category ids, `data["class_name"]` the names.

        Raises:
            InputError: the package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise InputError(
                f"to_supervision needs the package supervision ({error}); install it: python -m pip install supervision"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(),  # that package changes boxes in place
            confidence=self.scores.copy(),
            class_id=self.category_ids.copy(),
            data={"class_name": np.array(self.labels, dtype=np.str_)},
        )

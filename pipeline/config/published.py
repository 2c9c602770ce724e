"""The section `published`: what the paper and the released code report for a preset. For `jobs.table` and a warning."""

from typing import Literal

from pydantic import Field

from pipeline.config.base import Count, Section


class PublishedConfig(Section):
    """Figures to compare a run with; they change nothing in it. AP in percent, as printed; None = not reported.

    Sources: arXiv 2010.04159, tables 1 to 3; the read-me of the released Deformable DETR code.
    """

    table: Literal["", "1", "2", "3", "code"] = ""  # where the row stands; code: only in the released code's read-me
    row: str = ""  # how that row is called there
    epochs: Count | None = None
    global_batch: Count | None = None  # samples per optimizer step that the learning rates were chosen for
    ap: float | None = Field(None, ge=0, le=100)  # on COCO val2017, as are the next five
    ap50: float | None = Field(None, ge=0, le=100)
    ap75: float | None = Field(None, ge=0, le=100)
    ap_small: float | None = Field(None, ge=0, le=100)
    ap_medium: float | None = Field(None, ge=0, le=100)
    ap_large: float | None = Field(None, ge=0, le=100)
    ap_code: float | None = Field(None, ge=0, le=100)  # val2017 AP of the weights that were released with the code
    ap_test_dev: float | None = Field(None, ge=0, le=100)  # on COCO test-dev, whose boxes are not public
    params: float | None = Field(None, gt=0, le=1e6)  # millions
    gflops: float | None = Field(
        None, gt=0, le=1e6
    )  # thousand millions of multiply-adds per image at the evaluation size

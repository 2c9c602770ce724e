"""What the paper and the released code report for each preset: figures to compare a run with. No run reads them.

Sources: arXiv 2010.04159, tables 1 to 3; the read-me of the released Deformable DETR code. A preset without an entry
has no published row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Published:
    """One row of a table. AP in percent, as printed; None = not reported."""

    table: Literal["", "1", "2", "3", "code"] = ""  # where the row stands; code: only in the released code's read-me
    row: str = ""  # how that row is called there
    epochs: int | None = None
    global_batch: int | None = None  # samples per optimizer step that the learning rates were chosen for
    ap: float | None = None  # on COCO val2017, as are the next five
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    ap_code: float | None = None  # val2017 AP of the weights that were released with the code
    ap_test_dev: float | None = None  # on COCO test-dev, whose boxes are not public
    params: float | None = None  # millions
    gflops: float | None = None  # thousand millions of multiply-adds per image at the evaluation size


def find_published(preset: str) -> Published:
    """The figures of a preset by its file's name; all None if nothing is published of it."""
    return PUBLISHED.get(preset, Published())


# fmt: off
PUBLISHED: Mapping[str, Published] = {
    "r50_detr": Published(
        table="1", row="DETR", epochs=500, global_batch=64, ap=42.0, ap50=62.4, ap75=44.2, ap_small=20.5,
        ap_medium=45.8, ap_large=61.1, ap_code=42.0, params=41.0, gflops=86.0),
    "r50_detr_dc5": Published(
        table="1", row="DETR-DC5", epochs=500, global_batch=64, ap=43.3, ap50=63.1, ap75=45.9, ap_small=22.5,
        ap_medium=47.3, ap_large=61.1, ap_code=43.3, params=41.0, gflops=187.0),
    "r50_faster_rcnn_fpn": Published(
        table="1", row="Faster R-CNN + FPN", epochs=109, ap=42.0, ap50=62.1, ap75=45.5, ap_small=26.6, ap_medium=45.4,
        ap_large=53.4, params=42.0, gflops=180.0),
    "r50_detr_dc5_50ep": Published(
        table="1", row="DETR-DC5", epochs=50, global_batch=64, ap=35.3, ap50=55.7, ap75=36.8, ap_small=15.2,
        ap_medium=37.5, ap_large=53.6, params=41.0, gflops=187.0),
    "r50_detr_dc5_plus": Published(
        table="1", row="DETR-DC5+", epochs=50, global_batch=64, ap=36.2, ap50=57.0, ap75=37.4, ap_small=16.3,
        ap_medium=39.2, ap_large=53.9, params=41.0, gflops=187.0),
    "r50_deformable": Published(
        table="1", row="Deformable DETR", epochs=50, global_batch=32, ap=43.8, ap50=62.6, ap75=47.7, ap_small=26.4,
        ap_medium=47.1, ap_large=58.0, ap_code=44.5, params=40.0, gflops=173.0),
    "r50_deformable_refine": Published(
        table="1", row="+ iterative bounding box refinement", epochs=50, global_batch=32, ap=45.4, ap50=64.7,
        ap75=49.0, ap_small=26.8, ap_medium=48.3, ap_large=61.7, ap_code=46.2, params=40.0, gflops=173.0),
    "r50_deformable_two_stage": Published(
        table="1", row="++ two-stage", epochs=50, global_batch=32, ap=46.2, ap50=65.2, ap75=50.0, ap_small=28.8,
        ap_medium=49.2, ap_large=61.7, ap_code=46.9, ap_test_dev=46.9, params=40.0, gflops=173.0),
    "r50_deformable_single_scale_k1": Published(
        table="2", row="no inputs, no attention, K 1", epochs=50, global_batch=32, ap=39.7, ap50=60.1, ap75=42.4,
        ap_small=21.2, ap_medium=44.3, ap_large=56.0),
    "r50_deformable_own_level_k1": Published(
        table="2", row="inputs, no attention, K 1", epochs=50, global_batch=32, ap=41.4, ap50=60.9, ap75=44.9,
        ap_small=24.1, ap_medium=44.6, ap_large=56.1),
    "r50_deformable_own_level": Published(
        table="2", row="inputs, no attention, K 4", epochs=50, global_batch=32, ap=42.3, ap50=61.4, ap75=46.0,
        ap_small=24.8, ap_medium=45.1, ap_large=56.3),
    "r50_deformable_fpn": Published(
        table="2", row="inputs, attention, K 4, FPN", epochs=50, global_batch=32, ap=43.8, ap50=62.6, ap75=47.8,
        ap_small=26.5, ap_medium=47.3, ap_large=58.1),
    "r50_deformable_bifpn": Published(
        table="2", row="inputs, attention, K 4, BiFPN", epochs=50, global_batch=32, ap=43.9, ap50=62.5, ap75=47.7,
        ap_small=25.6, ap_medium=47.4, ap_large=57.7),
    "efficientdet_d7": Published(
        table="3", row="EfficientDet-D7 (EfficientNet-B6)", epochs=300, ap_test_dev=52.2, params=52.0),
    "r101_deformable_two_stage": Published(
        table="3", row="Deformable DETR (ResNet-101)", epochs=50, global_batch=32, ap_test_dev=48.7),
    "x101_deformable_two_stage": Published(
        table="3", row="Deformable DETR (ResNeXt-101)", epochs=50, global_batch=32, ap_test_dev=49.0),
    "x101_dcn_deformable_two_stage": Published(
        table="3", row="Deformable DETR (ResNeXt-101 + DCN)", epochs=50, global_batch=32, ap_test_dev=50.1),
    "x101_dcn_deformable_two_stage_tta": Published(
        table="3", row="Deformable DETR (ResNeXt-101 + DCN, TTA)", epochs=50, global_batch=32, ap_test_dev=52.3),
    "x101_fcos": Published(table="3", row="FCOS (ResNeXt-101)", epochs=24, ap_test_dev=44.7),
    "x101_dcn_atss_tta": Published(table="3", row="ATSS (ResNeXt-101 + DCN, TTA)", epochs=24, ap_test_dev=50.7),
    "r50_deformable_single_scale": Published(
        table="code", row="Deformable DETR (single scale)", epochs=50, global_batch=32, ap_small=20.6, ap_medium=43.0,
        ap_large=55.5, ap_code=39.4, params=34.0, gflops=78.0),
    "r50_deformable_single_scale_dc5": Published(
        table="code", row="Deformable DETR (single scale, DC5)", epochs=50, global_batch=32, ap_small=24.1,
        ap_medium=45.3, ap_large=56.0, ap_code=41.5, params=34.0, gflops=128.0),
    "r101_deformable": Published(global_batch=32),
    "r50_deformable_k1": Published(global_batch=32),
}
# fmt: on

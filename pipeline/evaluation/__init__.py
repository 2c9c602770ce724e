"""COCO AP: detections are gathered and measured by pycocotools, within a training run, beside it or alone."""

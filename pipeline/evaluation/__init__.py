"""COCO AP: detections gathered exactly and measured by pycocotools, within the training, beside it or alone."""

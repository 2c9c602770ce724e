"""COCO AP: compact detections, gathered exactly, measured by pycocotools."""

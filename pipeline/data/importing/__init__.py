"""Reads data sets as labelling tools export them, and splits them: COCO, YOLO, Pascal VOC and LabelMe, any archive."""

"""Reads data sets as labelling tools export them, and splits them: COCO, YOLO, Pascal VOC and LabelMe, in any archive.

The readers are our own, because libraries read less of what counts here. supervision reads unpacked folders of one
split, ignores EXIF and refuses images that are neither RGB nor gray; datumaro and FiftyOne bring OpenCV or a database.
None names the file and the line of a faulty label, and each layout is about a hundred lines.
"""

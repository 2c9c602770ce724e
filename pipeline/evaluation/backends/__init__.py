"""COCO AP by several packages behind one Protocol: pycocotools is the reference, the others are faster."""

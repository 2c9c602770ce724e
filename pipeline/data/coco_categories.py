"""The 80 categories of COCO, for published weights: they come without annotations and predict COCO's raw ids.

Everything else takes its categories from the index of the shards.
"""

from pipeline.data.index import Category

# One word per id from 1 on; "-" is an id that the data set does not use.
_NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -,
    backpack, umbrella, -, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant,
    bed, -, dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
    toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
COCO_CATEGORIES = tuple(
    Category(number, name) for number, name in enumerate(" ".join(_NAMES.split()).split(", "), start=1) if name != "-"
)

"""hotcoco (Rust, all cores); it takes columns as they are. Raises ImportError if it is not installed."""

from pipeline.evaluation.backends.base import Arrays, Task


class Hotcoco:
    """Backend of the package of that name."""

    package = "hotcoco"

    def run(self, task: Task) -> Arrays:
        """See Backend."""
        import hotcoco  # only here: it may be missing

        objects = task.objects
        truth = hotcoco.COCO.from_arrays(
            [{"id": image} for image in range(1, task.images + 1)],
            [{"id": category, "name": str(category)} for category in range(1, task.categories + 1)],
            objects.images,
            objects.categories,
            objects.boxes_xywh,
            area=objects.areas,
            iscrowd=objects.crowds,
        )
        evaluation = hotcoco.COCOeval(truth, truth.load_res(task.found.rows()), "bbox")
        evaluation.params.max_dets = list(task.limits)
        evaluation.evaluate()
        evaluation.accumulate()
        result = evaluation.eval
        assert result is not None, "it has accumulated"
        return Arrays(result["precision"], result["recall"], result["scores"])

"""Gauges of a run for Ray's dashboard and Prometheus, through `ray.util.metrics`.

Each rank reports its own step time and memory, rank 0 also the values of the whole run. Ray adds `ray_` to the names
and the node's address to the tags. Values that no gauge exists for are ignored.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

RUN = {  # of the run: metric in MLflow -> gauge
    "train/loss": ("detector_loss", "Training loss, mean of the last log interval"),
    "train/grad_norm": ("detector_grad_norm", "Gradient norm before clipping, mean of the last log interval"),
    "perf/images_per_s": ("detector_images_per_second", "Images of all ranks per second"),
    "perf/data_wait_share": ("detector_data_wait_share", "Share of time that rank 0 waits for data"),
    "epoch": ("detector_epoch", "Epoch, from 0"),
    "step": ("detector_step", "Optimizer steps done"),
    "AP": ("detector_ap", "COCO AP of the newest evaluation"),
}
RANK = {  # of each rank
    "step_seconds": ("detector_step_seconds", "Median seconds per optimizer step"),
    "own_seconds": ("detector_own_seconds", "Seconds per step for data and forward passes, without waiting for others"),
    "memory_mib": ("detector_memory_mib", "Peak memory of the rank, MiB"),
}


class Gauges:
    """The gauges of one rank of a run."""

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        names = {**RANK, **(RUN if rank == 0 else {})}
        self._gauges = {key: Gauge(*text, tag_keys=("run", "rank")) for key, text in names.items()}

    def set(self, values: Mapping[str, float | None]) -> None:
        """Set the gauges of this rank; None, and values without a gauge, are ignored."""
        for key, value in values.items():
            if key in self._gauges and value is not None:
                self._gauges[key].set(value, self._tags)

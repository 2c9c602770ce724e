"""Parameters and multiply-adds of the trials of a sweep, counted as `jobs.table` counts those of the presets.

Each different model is counted once. Multiply-adds are a mean over the validation images. Data sets such as COCO have
hundreds of image sizes, and each takes a second, so that a few sizes stand for all (`group_sizes`). Raises ShardError
without the shards.
"""

from collections.abc import Mapping, Sequence

from pipeline.config import Config
from pipeline.logs import get_logger
from pipeline.model.flops import Size
from pipeline.presets.rows import describe, evaluation_sizes, sizes_of
from tune.results.source import Cost
from tune.search.ledger import Trial
from tune.space import Space

SIZES = 6  # that stand for all

log = get_logger("report")


def find_costs(space: Space, trials: Sequence[Trial]) -> dict[str, Cost]:
    """The costs by the trial's name."""
    found: dict[str, Cost] = {}
    known: dict[str, Cost] = {}  # by what they depend on
    for trial in trials:
        config = space.config(trial.values, trial.name)
        key = config.model.model_dump_json() + config.data.augment.model_dump_json() + config.data.val
        if key not in known:
            log.info("counting the multiply-adds of %s", trial.name)
            known[key] = _count(config)
        found[trial.name] = known[key]
    return found


def group_sizes(sizes: Mapping[Size, int], most: int = SIZES) -> dict[Size, int]:
    """At most `most` of the sizes, with the number of images that each stands for: those of similar area."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    if len(ordered) <= most:
        return dict(sizes)
    images, before = sum(sizes.values()), 0
    groups: dict[int, list[Size]] = {}
    for size in ordered:
        middle = before + sizes[size] / 2
        groups.setdefault(int(middle * most / images), []).append(size)
        before += sizes[size]
    return {_typical(group, sizes): sum(sizes[size] for size in group) for group in groups.values()}


def _typical(group: Sequence[Size], sizes: Mapping[Size, int]) -> Size:
    """The size of a group whose area is closest to the group's mean."""
    mean = sum(height * width * sizes[height, width] for height, width in group) / sum(sizes[size] for size in group)
    return min(group, key=lambda size: abs(size[0] * size[1] - mean))


def _count(config: Config) -> Cost:
    originals = sizes_of(config.data.val)
    by_size: dict[Size, Size] = {}
    seen: dict[Size, int] = {}
    for size, images in originals.items():  # one original size stands for those that become the same
        (resized,) = evaluation_sizes({size: 1}, config.data.augment)
        by_size.setdefault(resized, size)
        seen[resized] = seen.get(resized, 0) + images
    row = describe(config.name, config, {by_size[size]: images for size, images in group_sizes(seen).items()})
    return Cost(row.parameters, row.gflops * 1e9)

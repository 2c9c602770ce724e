"""How long a run is, by its settings and its training data. Raises ConfigError if an epoch has no step."""

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.data.balance import epoch_length, read_factors
from pipeline.data.index import ShardIndex
from pipeline.data.plan import steps_per_epoch


@dataclass(frozen=True)
class Length:
    """The length of a run."""

    samples: int  # of an epoch, those that are repeated or dropped included
    per_epoch: int  # optimizer steps
    total: int  # optimizer steps of the whole run


def length_of(config: Config, train: ShardIndex) -> Length:
    """The length of a run of `config` on the shards of `train`, unless it ends by itself before."""
    settings = config.train
    samples = epoch_length(read_factors(config.data)) if config.data.balance else len(train)
    per_epoch = steps_per_epoch(samples, settings.global_batch, config.data.tail)
    total = per_epoch * settings.epochs
    return Length(samples, per_epoch, min(total, settings.max_steps or total))

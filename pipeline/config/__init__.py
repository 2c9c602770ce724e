"""Every setting of a run, with its meaning and its checks.

One grammar everywhere: `optim.lr` is the YAML path, the command-line override (`optim.lr=1e-4`), the Tune key and the
MLflow parameter. Precedence: defaults < `base:` file < YAML file < `key=value`. Sections are frozen and refuse unknown
keys; all faults of a config come in one `ConfigError`. Imports no torch, so `--dry-run` and Tune's driver stay light.
"""

from pipeline.config.augment import AugmentConfig
from pipeline.config.base import Section
from pipeline.config.compare import changed_for_resume, recipe_settings
from pipeline.config.data import DataConfig
from pipeline.config.load import (
    dump,
    dump_yaml,
    flatten,
    from_dict,
    from_record,
    load_config,
    override,
    parse_overrides,
    read_yaml,
)
from pipeline.config.model import BackboneConfig, LossConfig, ModelConfig
from pipeline.config.root import Config
from pipeline.config.training import (
    ApBackend,
    EvaluationConfig,
    OptimConfig,
    Precision,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "ApBackend",
    "AugmentConfig",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Precision",
    "ScalingConfig",
    "Section",
    "TrackingConfig",
    "TrainConfig",
    "changed_for_resume",
    "dump",
    "dump_yaml",
    "flatten",
    "from_dict",
    "from_record",
    "load_config",
    "override",
    "parse_overrides",
    "read_yaml",
    "recipe_settings",
]

"""Every config section, and how a config is loaded, overridden, checked and written.

One grammar everywhere: `optim.lr` is the YAML path, the command-line override (`optim.lr=1e-4`), the Tune key and the
MLflow parameter. Precedence: defaults < `base:` file < YAML file < `key=value`. Sections are frozen and refuse unknown
keys; all faults of a config come in one `ConfigError`. Imports no torch, so `--dry-run` and Tune's driver stay light.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import ConfigError
from pipeline.suggest import nearest


class Section(BaseModel):
    """Base of all sections: immutable, strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AugmentConfig(Section):
    """Training augmentation (reference recipe: Deformable DETR, COCO) and the evaluation size. Sizes in pixels."""

    flip: float = Field(0.5, ge=0, le=1)  # probability of a horizontal flip
    scales: tuple[int, ...] = (
        480,
        512,
        544,
        576,
        608,
        640,
        672,
        704,
        736,
        768,
        800,
    )  # shortest side, one is drawn
    max_size: int = Field(1333, ge=1)  # longest side after any resize to `scales` or `eval_size`
    crop: float = Field(0.5, ge=0, le=1)  # probability of branch B: resize, crop, resize
    crop_scales: tuple[int, ...] = (400, 500, 600)  # shortest side before the crop
    crop_range: tuple[int, int] = (384, 600)  # smallest and largest crop side
    eval_size: int = Field(800, ge=1)  # shortest side in evaluation


class DataConfig(Section):
    """Where the shards are and how samples become batches."""

    train: str = ""  # shard folder or fsspec URL written by `jobs.shard build`
    val: str = ""
    labels: Literal["contiguous", "raw"] = "contiguous"  # raw = published 91-logit layout: label is the category id
    workers: int = Field(2, ge=0)  # loader processes per rank
    window: int = Field(256, ge=1)  # samples among which similar sizes are grouped
    tail: Literal["drop", "wrap"] = "drop"  # what becomes of an epoch's last incomplete step
    augment: AugmentConfig = AugmentConfig()


class BackboneConfig(Section):
    """The convolutional trunk."""

    name: Literal["resnet50", "resnet101", "conv5"] = "resnet50"  # conv5: five small stages, for the demo
    weights: str = "imagenet"  # imagenet (torchvision V1 weights), none, or a local state_dict file
    norm: Literal["frozen_batch", "group"] = "frozen_batch"  # group: for training from nothing
    width: int = Field(32, ge=8)  # channels of conv5's first stage; the ResNets ignore it


class ModelConfig(Section):
    """Deformable DETR; the defaults are the published multi-scale model."""

    num_classes: int = Field(80, ge=1)  # 91 with `data.labels: raw` for published weights
    hidden_dim: int = Field(256, ge=8)
    heads: int = Field(8, ge=1)
    enc_layers: int = Field(6, ge=1)
    dec_layers: int = Field(6, ge=1)
    ffn_dim: int = Field(1024, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    queries: int = Field(300, ge=1)
    levels: int = Field(4, ge=1)
    enc_points: int = Field(4, ge=1)
    dec_points: int = Field(4, ge=1)
    refine: bool = False  # iterative bounding box refinement
    two_stage: bool = False  # proposals from the encoder; needs refine
    op: Literal["auto", "cuda", "cpu", "torch"] = "auto"  # implementation of MSDeformAttn
    backbone: BackboneConfig = BackboneConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of heads {self.heads}")
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of 4 (sine positions)")
        if self.two_stage and not self.refine:
            raise ValueError("two_stage needs refine: true (its decoder starts from boxes that are refined)")
        return self


class LossConfig(Section):
    """Weights of the set criterion and costs of the matcher."""

    class_weight: float = Field(2.0, ge=0)
    bbox_weight: float = Field(5.0, ge=0)
    giou_weight: float = Field(2.0, ge=0)
    class_cost: float = Field(2.0, ge=0)
    bbox_cost: float = Field(5.0, ge=0)
    giou_cost: float = Field(2.0, ge=0)
    focal_alpha: float = Field(0.25, ge=0, le=1)
    focal_gamma: float = Field(2.0, ge=0)
    aux: bool = True  # the same losses after every decoder layer


class OptimConfig(Section):
    """AdamW, its three parameter groups and the step schedule."""

    lr: float = Field(2e-4, gt=0)
    backbone_lr: float = Field(2e-5, ge=0)
    projection_factor: float = Field(0.1, gt=0)  # lr factor of sampling offsets and reference points
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = Field(0.1, ge=0)  # global gradient norm; 0 = off
    drop_epochs: tuple[int, ...] = (40,)  # lr is multiplied by drop_factor at the start of these epochs
    drop_factor: float = Field(0.1, gt=0)


class TrainConfig(Section):
    """Batch arithmetic, precision and the rhythm of checkpoints and evaluation."""

    epochs: int = Field(50, ge=1)
    global_batch: int = Field(32, ge=1)  # samples per optimizer step, whatever the world size
    micro_batch: int = Field(2, ge=1)  # samples padded together: the pad group
    max_steps: int | None = Field(None, ge=1)  # stop after this many optimizer steps in all
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2] = 1
    checkpoint_steps: int | None = Field(None, ge=1)  # besides after evaluations, every N steps
    keep_checkpoints: int = Field(2, ge=1)  # best ones by AP; the last is kept as well
    eval_epochs: int = Field(1, ge=1)  # evaluate and checkpoint after every N-th epoch and at the end
    log_steps: int = Field(10, ge=1)
    nonfinite_limit: int = Field(5, ge=1)  # stop after this many non-finite losses in a row

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        return self


class ScalingConfig(Section):
    """What one run asks of the Ray cluster."""

    num_workers: int = Field(1, ge=1)
    use_gpu: bool | Literal["auto"] = "auto"  # auto: GPUs if the cluster has one for every worker
    cpus_per_worker: float = Field(1, gt=0)  # without GPUs it is also the number of threads
    wait_minutes: float = Field(0, ge=0)  # how long an autoscaler may take to bring what is missing
    max_failures: int = Field(3, ge=-1)  # worker-group restarts before the run fails; -1 = no limit


class TrackingConfig(Section):
    """MLflow."""

    uri: str = "sqlite:///runs/mlflow.db"  # or http://server:5000
    experiment: str = "deformable-detr"
    register_as: str = ""  # registered model that the finished run becomes a version of; empty = none
    alias: str = "challenger"


class Config(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # run name; one folder under `storage`
    storage: str = "runs"  # folder or fsspec URL that every worker can write
    seed: int = Field(42, ge=0)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.labels == "raw" and self.model.num_classes != 91:
            raise ValueError("data.labels: raw is the published COCO layout and needs model.num_classes: 91")
        return self


def load_config(path: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> Config:
    """Read a YAML file (with at most one `base:` level), apply dotted overrides, validate.

    Args:
        path: YAML file; `base: other.yaml` in it is resolved against its own folder.
        overrides: `["optim.lr=1e-4"]`, values parsed as YAML, or `{"optim.lr": 1e-4}`.

    Raises:
        ConfigError: one message with every fault found.
    """
    tree = read_yaml(Path(path))
    base = tree.pop("base", None)
    if base is not None:
        parent = read_yaml(Path(path).parent / str(base))
        if "base" in parent:
            raise ConfigError(f"{path}: base {base} has a base of its own; only one level is allowed")
        tree = _merge(parent, tree)
    faults: list[str] = []
    for key, value in parse_overrides(overrides or {}, faults):
        _assign(tree, key, value, faults)
    return _validate(tree, str(path), faults)


def from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Validate a nested dict, as `dump` returns it. Raises ConfigError."""
    return _validate(tree, source, [])


def override(config: Config, overrides: list[str]) -> Config:
    """The config with `key=value` settings on top, as `load_config` would apply them. Raises ConfigError."""
    tree, faults = dump(config), list[str]()
    for key, value in parse_overrides(overrides, faults):
        _assign(tree, key, value, faults)
    return _validate(tree, "overrides", faults)


def dump(config: Config) -> dict[str, Any]:
    """The config as a nested dict of JSON types; `from_dict(dump(c)) == c`."""
    return config.model_dump(mode="json")


def dump_yaml(config: Config) -> str:
    """The config as YAML that `load_config` reads back."""
    return yaml.safe_dump(dump(config), sort_keys=False)


def flatten(config: Section) -> dict[str, Any]:
    """`{"optim.lr": 0.0002, ...}`: MLflow's parameters and the space of legal keys."""
    flat: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def parse_overrides(overrides: list[str] | dict[str, Any], faults: list[str]) -> list[tuple[str, Any]]:
    """`["optim.lr=1e-4"]` as `[("optim.lr", ...)]`, values read as YAML; what cannot be read is added to `faults`."""
    if isinstance(overrides, dict):
        return list(overrides.items())
    pairs: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key:
            faults.append(f"'{text}': overrides are written key=value, e.g. optim.lr=1e-4")
            continue
        try:
            pairs.append((key, yaml.safe_load(raw) if raw else ""))
        except yaml.YAMLError:
            faults.append(f"{key}: '{raw}' is not a YAML value")
    return pairs


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, `{}` if it is empty. Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    return tree


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _assign(tree: dict[str, Any], key: str, value: Any, faults: list[str]) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            faults.append(f"{key}: '{name}' is a value, not a section")
            return
        tree = child
    tree[leaf] = value


def _validate(tree: dict[str, Any], source: str, faults: list[str]) -> Config:
    try:
        config = Config.model_validate(tree)
        if not faults:
            return config
    except ValidationError as error:
        faults = faults + [_explain(fault) for fault in error.errors()]
    raise ConfigError("\n  ".join([f"{source}:", *faults]))


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = [*flatten(Config()), *Config.model_fields]
        return f"{key}: unknown key; did you mean '{nearest(key, known)}'?"
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], (dict, Section)) else f" (got {fault['input']!r})"
    return f"{key}: {message}{got}" if key else message

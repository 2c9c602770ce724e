"""The sections `optim`, `train`, `scaling`, `tracking` and `evaluation`: how a run is trained and watched."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import LARGEST, Auto, Count, Minutes, Natural, NonNegative, Rate, Section, Side, resolved
from pipeline.config.names import Alias, ModelName

Precision = Literal["fp32", "bf16", "fp16"]
ApBackend = Literal["auto", "pycocotools", "hotcoco", "ultrafast-pycocotools", "vernier"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW, its three parameter groups and how their learning rates move."""

    lr: float = Field(2e-4, gt=0, le=1e3)
    """Learning rate of all weights outside the backbone and the projections.
    When `train.global_batch` changes, multiply it by the square root of the change."""

    backbone_lr: Rate = 2e-5
    """Learning rate of the backbone; 0 keeps its weights as they are.
    A backbone without pretrained weights needs about `optim.lr`."""

    batch: Count | None = None
    """The `train.global_batch` that `optim.lr` and `optim.backbone_lr` are given for. With another batch both are
    multiplied by the square root of the ratio, as suits Adam; null takes them as they are."""

    projection_factor: float = Field(0.1, gt=0, le=1e3)
    """Factor on `optim.lr` for the layers that predict sampling offsets and reference points.
    They steer where attention looks, so the recipe trains them slowly."""

    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay of AdamW on all weights, norms and biases too."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""

    clip: NonNegative = 0.1
    """Largest norm of the gradient over all weights; a larger gradient is scaled down to it. 0 turns clipping off."""

    schedule: Literal["step", "cosine"] = "step"
    """How learning rates fall: `step` multiplies them by `optim.drop_factor` at `optim.drop_epochs`.
    `cosine` takes them to 0 over the whole run and does not read `optim.drop_epochs`."""

    warmup_steps: Natural = 0
    """Optimizer steps over which all learning rates rise linearly at the start; 0 turns it off.
    It is not in the paper. Use 500 or more with larger batches than the recipe's."""

    drop_epochs: tuple[Count, ...] = (40,)
    """Numbers of finished epochs after which learning rates are multiplied by `optim.drop_factor`.
    Move them along with `train.epochs`; the recipe drops once after 4/5 of the epochs."""

    drop_factor: float = Field(0.1, gt=0, le=1)
    """Factor on all learning rates at each of `optim.drop_epochs`."""


class TrainConfig(Section):
    """Batch arithmetic, precision and the rhythm of checkpoints and evaluation."""

    epochs: Count = 50
    """Passes over the training data.
    With another number move `optim.drop_epochs` too."""

    global_batch: Count = 32
    """Samples per optimizer step, whatever the number of workers; a multiple of `train.micro_batch`.
    It is part of the recipe: with another value adapt `optim.lr`."""

    micro_batch: Count | Auto = 2
    """Samples padded together on one worker: the pad group. The padding is part of the arithmetic.
    More use a GPU better and need more memory. `auto` takes what fits into this machine when the run first starts."""

    max_steps: Count | None = None
    """Stop after this many optimizer steps in all, for a short trial; null means `train.epochs` decides."""

    max_minutes: float | None = Field(None, gt=0, le=1e6)
    """Stop training after so many minutes over all starts of the run, with a last evaluation; null sets no limit.
    The evaluation comes on top."""

    patience: Count | None = None
    """Stop after this many evaluations in a row without a higher AP; null trains all `train.epochs`.
    Evaluations then run between the steps, so that a resumed run ends where it would have ended without a stop."""

    precision: Precision = "fp32"
    """Number format of matrix products and convolutions.
    Coordinates, boxes, matcher, losses, weights and gradients stay fp32. bf16 is faster on GPUs that have it."""

    cast_weights_once: bool = False
    """Cast all weights to bf16 or fp16 at once in each pass, instead of each where it is used: the same bits.
    For `deformable_detr` and `detr`. Needs `train.zero_stage` below 3."""

    fold_norms: bool = False
    """Multiply the frozen norms' factors into the weights of the convolutions before them, once in each pass.
    It changes results by rounding only. Needs `train.zero_stage` below 3."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 1
    """What DeepSpeed ZeRO divides among the workers: 1 moments, 2 also gradients, 3 also weights; 0 nothing.
    Higher stages save memory per worker and communicate more. `auto` is 0 below 8 GB of weights, gradients and moments,
    else 1."""

    delay_results: bool = False
    """On a GPU read a step's losses while the next one runs, so that the host does not wait; AdamW checks gradients.
    A non-finite step is reported one step later. Not for fp16, `train.ema_decay` or `train.zero_stage` 1 to 3."""

    offload_optimizer: bool = False
    """Keep the optimizer's moments and update on the CPU: saves GPU memory, costs time.
    Needs `train.zero_stage` 1, 2 or 3."""

    checkpoint_steps: Count | None = None
    """Also save a checkpoint every this many optimizer steps; null saves only with evaluations.
    Set it where epochs take long or machines may be lost."""

    checkpoint_upload: Literal["sync", "async"] = "sync"
    """Whether training waits until the storage has a checkpoint (`sync`) or continues meanwhile (`async`)."""

    keep_checkpoints: Count = 2
    """Number of checkpoints with the best AP that are kept; the last one is always kept as well."""

    eval_epochs: Count = 1
    """Evaluate and save a checkpoint after every this many epochs, and at the end.
    Raise it where an evaluation takes long beside an epoch."""

    log_steps: Count = 10
    """Optimizer steps between two records of losses, learning rates and speed in MLflow and the log."""

    ema_decay: float = Field(0.0, ge=0, lt=1)
    """Decay per step of a moving average of the weights, which is then evaluated and registered; 0 turns it off.
    Usual values are 0.999 to 0.9998. Needs `train.zero_stage` below 3."""

    compile: bool = False
    """Use torch.compile for the backbone and the transformer's layers in training.
    Steps get faster after a slow start. Needs `train.zero_stage` below 3."""

    nonfinite_limit: Count = 5
    """Stop the run after this many steps in a row whose loss or gradient is not finite; such steps are skipped."""

    drift_steps: Natural = 500
    """Compare the weights of all workers every this many optimizer steps; 0 turns it off.
    A difference means faulty hardware: the run then continues from its last checkpoint."""

    hang_minutes: Minutes = 20
    """Minutes after which an unfinished step counts as hung; 0 turns it off.
    The process writes the stacks of all threads and ends; the run continues from its last checkpoint."""

    deterministic: bool = False
    """Get the same bits in every run on the same hardware, by deterministic kernels; slower on a GPU."""

    channels_last: bool = False
    """Keep the backbone's weights and maps with channels as the innermost axis, as a GPU's convolutions compute.
    It changes results by rounding only. Needs `train.zero_stage` 0 or `auto`."""

    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """How a GPU may round inputs of float32 matrix products in training: `high` uses TF32, several times faster.
    Evaluation always computes with `highest`."""

    expandable_segments: bool = False
    """Let torch's GPU allocator grow its blocks instead of adding new ones, so that images of many sizes do not
    fragment the memory. On a CPU it has no effect."""

    cpu_tuning: bool = True
    """On a CPU, run linear layers as convolutions and keep freed memory in the process: about 0.6 of the time per step.
    It changes results by rounding only. On a GPU it has no effect."""

    profile_steps: tuple[Count, Count] | None = None
    """First and last optimizer step to trace, counted from 1, e.g. [10, 15]; null traces none.
    The Chrome trace of rank 0 lies in the run's folder under `profile`."""

    @property
    def pad_group(self) -> int:
        """Samples padded together. Raises ConfigError while `micro_batch` is `auto`."""
        return resolved(self.micro_batch, "train.micro_batch")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.micro_batch != "auto" and self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer moves what ZeRO divides: it needs zero_stage 1, 2 or 3")
        if self.zero_stage == 3 and self.ema_decay:
            raise ValueError("ema_decay averages whole weights, which zero_stage 3 keeps on no rank; use 0, 1 or 2")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile cannot trace how zero_stage 3 fetches weights; use 0, 1 or 2")
        if self.delay_results and (self.precision == "fp16" or self.ema_decay or self.zero_stage not in (0, "auto")):
            raise ValueError(
                "delay_results leaves the check of gradients to the GPU, but precision fp16, ema_decay and zero_stage "
                "1 to 3 need its result at once; leave delay_results out"
            )
        if self.channels_last and self.zero_stage not in (0, "auto"):
            raise ValueError("channels_last changes weights that zero_stage 1 to 3 keeps in its buffers; use 0 or auto")
        if self.zero_stage == 3 and (self.cast_weights_once or self.fold_norms):
            raise ValueError(
                "cast_weights_once and fold_norms need whole weights, which no rank has at zero_stage 3; use 0, 1 or 2"
            )
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)} ends before it begins; give [first, last]")
        return self


class ScalingConfig(Section):
    """What one run asks of the Ray cluster."""

    num_workers: Count = 1
    """Training processes, one per GPU where GPUs are used; results do not depend on it, to rounding.
    With `scaling.min_workers` it is the largest number."""

    min_workers: Count | None = None
    """Smallest number of workers the run accepts, at most `scaling.num_workers`; null means exactly `num_workers`.
    Set it where nodes may be lost and the run should continue with fewer."""

    use_gpu: bool | Literal["auto"] = "auto"
    """Whether every worker gets a GPU. `auto` uses GPUs if the cluster has one for every worker."""

    cpus_per_worker: float = Field(1, ge=0.001, le=10_000)
    """CPUs that Ray reserves for each worker; without GPUs it is also the number of threads.
    On a CPU machine set it to cores / `scaling.num_workers`."""

    wait_minutes: Minutes = 0
    """Minutes an autoscaler may take to bring, or to replace, nodes that are missing.
    0 refuses a run that the cluster cannot hold now."""

    max_failures: int = Field(3, ge=-1, le=LARGEST)
    """Restarts of the worker group before the run fails; -1 sets no limit.
    Raise it on machines that are often taken away."""

    @property
    def min_required(self) -> int:
        """Workers without which the run does not start."""
        return self.min_workers or self.num_workers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_required > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        return self


class TrackingConfig(Section):
    """MLflow: where a run is recorded, and under which name its model is registered."""

    uri: str = ""
    """MLflow store: sqlite:///FILE or http://HOST:PORT. Credentials belong in the environment.
    Empty takes an existing run's store, else MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db."""

    experiment: str = Field("deformable-detr", min_length=1, max_length=500)
    """MLflow experiment that holds the run; it is created if it does not exist."""

    register_as: ModelName = ""
    """Registered model that the finished run becomes a version of; empty registers nothing."""

    alias: Alias = "challenger"
    """Alias that the new version of `tracking.register_as` gets; empty sets none."""


class EvaluationConfig(Section):
    """What is scored, and where; with several views of an image its detections are merged (test-time augmentation)."""

    where: Literal["auto", "inline", "tasks"] = "auto"
    """Where a training run evaluates: `inline` between two steps on all workers, or `tasks` beside the training.
    A task takes the resources of one worker. `auto` uses tasks if the cluster has room for one, else inline.
    The AP is the same; a sweep is always inline."""

    task_minutes: float = Field(240, gt=0, le=1e6)
    """Minutes after which an evaluation task is given up, its wait for free resources included."""

    micro_batch: Count = 1
    """Images padded together in evaluation; 1 is what prediction does.
    More are faster on a GPU, but padding changes the AP of models without `model.norm_valid`."""

    max_images: Count | None = None
    """Evaluate at most so many images, spread evenly over `data.val`; null evaluates all.
    For a quick look: the numbers are of this subset, and the run, MLflow and the terminal say so."""

    top_k: Count = 100
    """Detections kept per image over all classes; the published number is 100.
    With more, the 12 COCO numbers stay those of the best 100, and `AP_top300` and so on are added for 300."""

    backend: ApBackend = "auto"
    """The package that computes AP; all of them give the bits of pycocotools.
    `auto` takes hotcoco, the fastest, if it is installed. pycocotools checks a run's last evaluation in any case."""

    scales: tuple[Side, ...] = ()
    """Shortest sides in pixels at which each image is evaluated; empty takes `data.augment.eval_size` alone.
    Several sizes raise AP and cost time."""

    flip: bool = False
    """Also evaluate the mirror image at every size."""

    merge_iou: float = Field(0.65, gt=0, le=1)
    """IoU above which detections of one class from different views count as one object.
    Read only where there are several views."""

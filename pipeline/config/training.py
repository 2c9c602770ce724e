"""The sections `optim`, `train`, `scaling`, `tracking` and `evaluation`: how a run is trained and watched."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.config.base import LARGEST, Count, Minutes, Natural, NonNegative, Rate, Section, Side
from pipeline.config.names import Alias, ModelName

Precision = Literal["fp32", "bf16", "fp16"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(Section):
    """AdamW, its three parameter groups and how their learning rates move."""

    lr: float = Field(2e-4, gt=0, le=1e3)
    backbone_lr: Rate = 2e-5
    projection_factor: float = Field(0.1, gt=0, le=1e3)  # lr factor of sampling offsets and reference points
    weight_decay: NonNegative = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    clip: NonNegative = 0.1  # global gradient norm; 0 = off
    schedule: Literal["step", "cosine"] = "step"  # cosine: from lr to 0 over the whole run, drop_epochs is not read
    warmup_steps: Natural = 0  # linear rise of all learning rates over the first steps; not in the paper
    drop_epochs: tuple[Count, ...] = (40,)  # lr is multiplied by drop_factor at the start of these epochs
    drop_factor: float = Field(0.1, gt=0, le=1)


class TrainConfig(Section):
    """Batch arithmetic, precision and the rhythm of checkpoints and evaluation."""

    epochs: Count = 50
    global_batch: Count = 32  # samples per optimizer step, whatever the world size
    micro_batch: Count = 2  # samples padded together: the pad group
    max_steps: Count | None = None  # stop after this many optimizer steps in all
    # Of matrix products and convolutions; coordinates, boxes, matcher, losses, weights and gradients stay fp32.
    precision: Precision = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 1  # divided among the ranks: 1 moments, 2 and gradients, 3 and weights
    offload_optimizer: bool = False  # moments and update on the CPU: saves GPU memory, costs time; needs zero_stage
    checkpoint_steps: Count | None = None  # besides after evaluations, every N steps
    checkpoint_upload: Literal["sync", "async"] = "sync"  # async: training goes on while the storage takes it
    keep_checkpoints: Count = 2  # best ones by AP; the last is kept as well
    eval_epochs: Count = 1  # evaluate and checkpoint after every N-th epoch and at the end
    log_steps: Count = 10
    ema_decay: float = Field(0.0, ge=0, lt=1)  # moving average of the weights, evaluated and registered; 0 = off
    compile: bool = False  # torch.compile of the backbone and the transformer's layers, in training
    nonfinite_limit: Count = 5  # stop after this many non-finite losses in a row
    drift_steps: Natural = 500  # compare the weights of all ranks every N steps; 0 = off
    hang_minutes: Minutes = 20  # a step that takes longer ends the process with all stacks; 0 = off
    deterministic: bool = False  # the same bits in every run on the same hardware; slower on a GPU
    # Trace of these optimizer steps, first and last, e.g. [10, 15]; a Chrome trace in the run's folder; None = off
    profile_steps: tuple[Count, Count] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer moves what ZeRO divides: it needs zero_stage 1, 2 or 3")
        if self.zero_stage == 3 and self.ema_decay:
            raise ValueError("ema_decay averages whole weights, which zero_stage 3 keeps on no rank; use 0, 1 or 2")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile cannot trace how zero_stage 3 fetches weights; use 0, 1 or 2")
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"profile_steps {list(self.profile_steps)} ends before it begins; give [first, last]")
        return self


class ScalingConfig(Section):
    """What one run asks of the Ray cluster."""

    num_workers: Count = 1  # with min_workers: the most
    min_workers: Count | None = None  # the run takes any number from here to num_workers; None = fixed
    use_gpu: bool | Literal["auto"] = "auto"  # auto: GPUs if the cluster has one for every worker
    cpus_per_worker: float = Field(1, ge=0.001, le=10_000)  # without GPUs it is also the number of threads
    wait_minutes: Minutes = 0  # how long an autoscaler may take to bring, or to replace, what is missing
    max_failures: int = Field(3, ge=-1, le=LARGEST)  # worker-group restarts before the run fails; -1 = no limit

    @property
    def least(self) -> int:
        """Workers without which the run does not start."""
        return self.min_workers or self.num_workers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.least > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        return self


class TrackingConfig(Section):
    """MLflow."""

    # sqlite:///FILE or http://HOST:PORT; empty = an existing run's own, else MLFLOW_TRACKING_URI, else
    # sqlite:///runs/mlflow.db
    uri: str = ""
    experiment: str = Field("deformable-detr", min_length=1, max_length=500)
    register_as: ModelName = ""  # registered model that the finished run becomes a version of; empty = none
    alias: Alias = "challenger"  # that the new version gets; empty = none


class EvaluationConfig(Section):
    """What is scored, and where; with several looks at an image its detections are merged (test-time augmentation)."""

    # Of a training run's evaluations. inline: between two steps, on all workers. tasks: beside the training, in a Ray
    # task that takes what a worker takes. auto: tasks if the cluster has a place left for one, else inline. Same AP.
    # A sweep is always inline.
    where: Literal["auto", "inline", "tasks"] = "auto"
    task_minutes: float = Field(
        240, gt=0, le=1e6
    )  # a task that takes longer, its wait for a free place included, is given up
    # Images padded together. 1 is as prediction sees them; more are faster on a GPU, and padding moves the AP of models
    # without `model.norm_valid`.
    micro_batch: Count = 1
    # Detections per image over all classes; the published figure is 100. pycocotools scores the best 100 of each class
    # of an image whatever this says, so more detections can only add some of classes that the first 100 left out.
    top_k: Count = 100
    scales: tuple[Side, ...] = ()  # shortest sides; empty = `data.augment.eval_size` alone
    flip: bool = False  # also the mirror image at every size
    merge_iou: float = Field(0.65, gt=0, le=1)  # detections of a class that overlap more are one object

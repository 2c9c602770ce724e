"""The published optimizer recipe: AdamW over three parameter groups, and the schedule of their learning rates.

A schedule is a pure function of epoch and step, so nothing of it is saved. Source: Deformable DETR (ICLR 2021),
appendix A.4, and the released training script: drops at given epochs, no warm-up. The cosine is that of SGDR (arXiv
1608.03983) without restarts.
"""

import math
from typing import Any

import torch
from torch import nn

from pipeline.config import OptimConfig

# These linear layers steer where attention looks; the recipe trains them at a tenth of the learning rate.
PROJECTIONS = ("reference_points", "sampling_offsets")


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters in three groups: `main`, `backbone`, `projection`, each with its base `lr`.

    Weight decay applies to all of them, also to norms and biases. Empty groups are left out, because DeepSpeed drops
    them, which shifts the following ones.
    """
    rates = {
        "main": optim.lr,
        "backbone": optim.backbone_lr,
        "projection": optim.lr * optim.projection_factor,
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name)].append(parameter)
    return [
        {"params": members[name], "lr": rate, "base_lr": rate, "name": name}
        for name, rate in rates.items()
        if members[name]
    ]


def build_optimizer(model: nn.Module, optim: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused on GPUs."""
    return torch.optim.AdamW(
        parameter_groups(model, optim),
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=device.type == "cuda",
    )


def lr_factor(optim: OptimConfig, epoch: int, step: int, total_steps: int) -> float:
    """The factor of every base learning rate in one optimizer step.

    Args:
        optim: `schedule`, `warmup_steps`, `drop_epochs`, `drop_factor`.
        epoch: the step's, from 0.
        step: of the whole run, from 0; skipped steps count.
        total_steps: of the whole run. Only the cosine uses it: resuming with more epochs raises the rate again.
    """
    warmup = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    if optim.schedule == "step":
        return warmup * optim.drop_factor ** sum(drop <= epoch for drop in optim.drop_epochs)
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return warmup * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


def rates_for_batch(optim: OptimConfig, global_batch: int) -> OptimConfig:
    """The section with the rates that `optim.batch` asks for at this batch: times the square root of the ratio.

    Adam's update does not grow with the gradient, so rates follow the square root of the batch (arXiv 2205.10287).
    """
    factor = math.sqrt(global_batch / optim.batch) if optim.batch else 1.0
    return optim.model_copy(update={"lr": optim.lr * factor, "backbone_lr": optim.backbone_lr * factor})


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group to `base_lr * factor`; returns `{group name: lr}`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def _group_of(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    return "projection" if any(part in name for part in PROJECTIONS) else "main"

"""What this machine has: cores and GPUs."""

import os

import torch

from pipeline.launch.finetune.choice import Machine
from pipeline.launch.preflight import GIB


def this_machine() -> Machine:
    """The cores and GPUs that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    memory = [torch.cuda.get_device_properties(number).total_memory / GIB for number in range(count)]
    return Machine(cores, count, min(memory, default=0.0))

"""Advice for runs that do not fit, and which errors it ends."""

import pickle
from typing import Any

import pytest
import torch

from pipeline.config import Config, from_dict
from pipeline.engine.memory import is_out_of_memory, memory_advice, memory_error
from pipeline.errors import MemoryFullError


def config_of(**sections: Any) -> Config:
    return from_dict({"model": {"backbone": {"weights": "none"}}, **sections})


def keys(advice: str) -> list[str]:
    return [part.partition("=")[0].removeprefix("smaller images: ") for part in advice.split("; or ")]


def test_advice_names_settings_that_change_something_and_smaller_groups_first() -> None:
    config = config_of(train={"global_batch": 12, "micro_batch": 4})
    advice = memory_advice(config, on_gpu=True)
    assert advice.startswith("train.micro_batch=3 ")
    assert keys(advice) == ["train.micro_batch", "model.checkpoint_encoder", "train.precision",
                            "train.offload_optimizer", "data.augment.scales"]  # fmt: skip
    used = from_dict(
        {
            "model": {"backbone": {"weights": "none"}, "checkpoint_encoder": True},
            "train": {"global_batch": 4, "micro_batch": 1, "precision": "bf16", "offload_optimizer": True},
        }
    )
    assert keys(memory_advice(used, on_gpu=True)) == ["data.augment.scales"]


def test_advice_on_a_cpu_does_not_name_what_only_gpus_have() -> None:
    advice = memory_advice(config_of(data={"workers": 4}), on_gpu=False)
    assert "precision" not in advice
    assert "offload" not in advice
    assert "data.workers=0" in advice


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: 1 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_failed_allocation_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)


def test_memory_error_has_the_advice_and_travels_between_processes() -> None:
    config = config_of()
    error = memory_error(config, True, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"))
    assert isinstance(error, MemoryFullError)
    assert memory_advice(config, True) in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)

"""A deterministic training step is bit-equal when repeated; in its own process, which the setting affects."""

import subprocess
import sys

from support.paths import ROOT

PROGRAM = """
import os
from pipeline.runtime import make_deterministic
make_deterministic()
import torch
from support.worlds import MODELS, run_plain
assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
for name in MODELS:
    a, b = run_plain(name, "fp32"), run_plain(name, "fp32")
    assert a.losses == b.losses and a.norms == b.norms
    assert all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)
print("equal")
"""


def test_deterministic_training_is_bit_equal() -> None:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.stdout.strip().endswith("equal"), done.stderr

#!/usr/bin/env bash
# First run on the GPU machine, from the project's root, after prepare.sh; at most 300 s. Results go to $OUT.
#   OUT=folder bash benchmarks/gpu_machine/first.sh
# Machine limits, the tests that need a GPU, the operator's times, and as much of benchmarks.gpu as fits.
set -o pipefail
source benchmarks/gpu_machine/environment.sh || exit 1
(nvcc -O3 -std=c++20 -arch="$GPU_ARCH" -o "$SCRATCH/limits" benchmarks/gpu_machine/limits.cu &&
  timeout 40 "$SCRATCH/limits" >"$OUT/limits.txt" 2>&1) &
python3 -m pipeline.csrc.build --device cuda || exit 1
wait
cat "$OUT/limits.txt"
timeout 90 python3 -m pytest -q -p no:cacheprovider -o filterwarnings=default -m "gpu and not slow" \
  $(find tests -path 'tests/model/ops/*' -name 'test_*.py' -o -name test_feed.py -o -name test_deformable.py) >"$OUT/tests.txt" 2>&1
tail -15 "$OUT/tests.txt"
timeout 40 python3 -m benchmarks.gpu_machine.kernels --time | tee "$OUT/kernels.jsonl"
timeout 30 python3 -m benchmarks.gpu_machine.kernels --time --fresh | tee -a "$OUT/kernels.jsonl"
timeout 90 python3 -m benchmarks.gpu --budget 75 --batches 2 --out "$OUT" >"$OUT/gpu.log" 2>&1
tail -45 "$OUT/gpu.log"

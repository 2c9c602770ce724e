#!/usr/bin/env bash
# Second run on the GPU machine, from the project's root, after prepare.sh; at most 330 s. Results go to $OUT.
#   OUT=folder bash benchmarks/gpu_machine/second.sh
# Shipped kernels against those that may replace them, their counters, the engine's step, and memcheck.
set -o pipefail
source benchmarks/gpu_machine/environment.sh || exit 1
python3 -m pipeline.csrc.build --device cuda || exit 1
all=specialised,sectors,large_tiles,neighbours
timeout 60 python3 -m benchmarks.gpu_machine.kernels --time --rounds 2 --kernels shipped specialised sectors large_tiles \
  neighbours specialised,large_tiles specialised,neighbours "$all" | tee "$OUT/choices.jsonl"
counters=l1tex__t_sector_hit_rate.pct,l1tex__data_bank_conflicts_pipe_lsu_mem_global_op_ld.sum
counters+=,l1tex__data_pipe_lsu_wavefronts.sum,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum
counters+=,lts__t_sectors_op_read.sum,lts__t_sectors_op_red.sum,sm__inst_executed.sum
counters+=,smsp__issue_active.avg.pct_of_peak_sustained_active,gpu__time_duration.sum
timeout 60 ncu --clock-control none -k 'regex:fast_|specialised' --metrics "$counters" \
  python3 -m benchmarks.gpu_machine.kernels --kernels shipped neighbours "$all" >"$OUT/ncu.txt" 2>&1
tail -70 "$OUT/ncu.txt"
timeout 120 python3 -m benchmarks.gpu --parts steps --variants bf16 bf16_gpu_preset bf16_gpu_preset_compile --steps 6 \
  --new-sizes 3 --budget 110 --out "$OUT" 2>"$OUT/steps.err"
# The caching allocator would hide writes beyond a tensor's end within its block.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 60 compute-sanitizer --tool memcheck python3 -m pytest -q -p no:cacheprovider \
  -o filterwarnings=default -m gpu $(find tests -path "tests/model/ops/*" ! -name test_ops_gpu.py -name "test_*.py") \
  -k "float32 or half or layouts or fast_sizes_equal" >"$OUT/memcheck.txt" 2>&1
tail -5 "$OUT/memcheck.txt"

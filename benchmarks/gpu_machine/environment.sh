# Sourced by first.sh and second.sh: the packages that the machine lacks, the architecture, a cache for the operator.
: "${OUT:?name a folder for the results: OUT=folder bash benchmarks/gpu_machine/first.sh}"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SCRATCH=$(mktemp -d)
export PYTHONUNBUFFERED=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} DEFORMABLE_OP_CACHE=$SCRATCH/op
GPU_ARCH=sm_${TORCH_CUDA_ARCH_LIST//./}
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$SCRATCH/site" \
  .gpu_machine/wheels/*.whl || { echo "no wheels: run benchmarks/gpu_machine/prepare.sh first" >&2; return 1; }
export PYTHONPATH=$SCRATCH/site

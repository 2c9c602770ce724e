// `main INPUT OUTPUT`: runs the cases in INPUT one after the other. `main bug NAME`: runs a kernel with a known bug, which
// the stand-in for CUDA must notice.

#include <stdio.h>

#include <fstream>
#include <iterator>
#include <string>

#include "cases.h"

namespace {

using namespace msda;

// A barrier that only half of the block reaches.
__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 128) __syncthreads();
  out[threadIdx.x] = 1.f;
}

// A shuffle that part of a warp leaves out.
__global__ void divergent_shuffle(float* out) {
  out[threadIdx.x] = 1.f;
  if (threadIdx.x % 32 < 30) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.f, 1);
}

// Reads what a neighbour leaves in shared memory, without waiting for it: NaN for some order of the lanes.
__global__ void forgotten_barrier(float* out) {
  MSDA_SHARED(float, left, kBlock);
  left[threadIdx.x] = 1.f;
  out[threadIdx.x] = left[threadIdx.x ^ 1];
}

// Skips the slot of a point that is off the map, and sums over all slots.
__global__ void uninitialised_slot(float* out) {
  MSDA_SHARED(float, slots, kBlock);
  if (threadIdx.x % 8 != 3) slots[threadIdx.x] = 1.f;
  __syncthreads();
  float sum = 0.f;
  for (unsigned i = 0; i < 8; ++i) sum += slots[threadIdx.x / 8 * 8 + i];
  out[threadIdx.x] = sum;
}

__global__ void beside_shared_memory(float* out) {
  MSDA_SHARED(float, slots, kBlock);
  slots[threadIdx.x + 1] = 1.f;
  out[threadIdx.x] = 1.f;
}

__global__ void misaligned_vector(float* out) {
  if (threadIdx.x == 0) atomicAdd(reinterpret_cast<float4*>(out + 1), make_float4(1.f, 1.f, 1.f, 1.f));
}

int bug(const std::string& name) {
  const Array<float> out(kBlock, 0, 0xff);
  cuda_host::seed(1);
  const auto run = [&](void (*kernel)(float*)) { launch(kernel, 1, nullptr, out.get()); };
  if (name == "divergent_barrier") run(divergent_barrier);
  if (name == "divergent_shuffle") run(divergent_shuffle);
  if (name == "forgotten_barrier") run(forgotten_barrier);
  if (name == "uninitialised_slot") run(uninitialised_slot);
  if (name == "beside_shared_memory") run(beside_shared_memory);
  if (name == "misaligned_vector") run(misaligned_vector);
  for (int i = 0; i < kBlock; ++i) {
    if (out.get()[i] != out.get()[i]) {
      fprintf(stderr, "NaN in the output\n");
      return 4;
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  if (std::string(argv[1]) == "bug") return bug(argv[2]);
  std::ifstream file(argv[1], std::ios::binary);
  Streams io;
  io.in.assign(std::istreambuf_iterator<char>(file), {});
  while (io.read < io.in.size()) {
    const Array<int64_t> head = io.take<int64_t>(14, 0);
    const int64_t* h = head.get();
    Case c{h[0], h[1], h[2], h[3], h[4], h[5], h[6], {}};
    c.geometry = {h[7], h[8], h[9], h[10], h[11], int32_t(h[12]), int32_t(h[13]), {}, {}, {}};
    const Array<int64_t> sizes = io.take<int64_t>(2 * h[12], 0);
    int32_t start = 0;
    for (int64_t level = 0; level < h[12]; ++level) {
      c.geometry.height[level] = static_cast<int32_t>(sizes.get()[2 * level]);
      c.geometry.width[level] = static_cast<int32_t>(sizes.get()[2 * level + 1]);
      c.geometry.start[level] = start;
      start += c.geometry.height[level] * c.geometry.width[level];
    }
    cuda_host::seed(static_cast<uint64_t>(c.seed));
    void (*const run[])(const Case&, Streams&) = {run_float32, run_float64, run_bfloat16, run_float16};
    run[c.type](c, io);
  }
  std::ofstream(argv[2], std::ios::binary).write(io.out.data(), static_cast<std::streamsize>(io.out.size()));
  return 0;
}

// What the device code of pipeline/csrc needs of CUDA, for a C++ compiler: the tests run the kernels on the CPU, slowly.
// Threads of a block are fibers. A lane runs until its warp or its block must meet; then another, in an order drawn from
// a seed, so that code which forgot to synchronise reads what is not there yet. All lanes must meet at the same line,
// and none may have left: else the run stops with a message. Shared memory is filled with NaN before each block and
// lies on the heap, where AddressSanitizer sees an access beside it. Blocks run in an order drawn from the seed too.

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cstddef>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define MSDA_SHARED(Type, name, count) \
  Type* const name = static_cast<Type*>(cuda_host::shared_memory(sizeof(Type) * (count), __LINE__))

struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 { unsigned x = 1, y = 1, z = 1; };
using cudaStream_t = void*;

namespace cuda_host {

extern dim3 thread_index, block_index, grid_size, block_size;
void* shared_memory(size_t bytes, int line);  // the block's array that is declared in this line
void meet_warp(int line);                     // returns when all lanes of the warp are in this line
void meet_block(int line);
void* exchange(int lane);  // 16 bytes of a lane, to hand over between two meetings
void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);  // every block, every thread
void seed(uint64_t value);
void note(void (*kernel)());  // prints the name of a kernel that is launched

template <typename T>
T shuffle(T v, int from, int line) {
  static_assert(sizeof(T) <= 16);
  memcpy(exchange(static_cast<int>(thread_index.x % 32)), &v, sizeof(T));
  meet_warp(line);
  T other;
  memcpy(&other, exchange(from), sizeof(T));
  meet_warp(-line);
  return other;
}
inline unsigned ballot(bool v, int line) {
  memcpy(exchange(static_cast<int>(thread_index.x % 32)), &v, sizeof v);
  meet_warp(line);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    bool other;
    memcpy(&other, exchange(i), sizeof other);
    result |= static_cast<unsigned>(other) << i;
  }
  meet_warp(-line);
  return result;
}

}  // namespace cuda_host

#define threadIdx cuda_host::thread_index
#define blockIdx cuda_host::block_index
#define gridDim cuda_host::grid_size
#define blockDim cuda_host::block_size
#define __syncthreads() cuda_host::meet_block(__LINE__)
#define __syncwarp() cuda_host::meet_warp(__LINE__)
#define __shfl_sync(mask, v, lane) cuda_host::shuffle(v, lane, __LINE__)
#define __shfl_xor_sync(mask, v, distance) \
  cuda_host::shuffle(v, static_cast<int>(threadIdx.x % 32) ^ (distance), __LINE__)
#define __ballot_sync(mask, v) cuda_host::ballot(v, __LINE__)
#define __any_sync(mask, v) (cuda_host::ballot(v, __LINE__) != 0)
#define __all_sync(mask, v) (cuda_host::ballot(v, __LINE__) == 0xffffffffu)
#define __ffs(v) __builtin_ffs(v)

template <typename T>
T __ldg(const T* from) { return *from; }
template <typename T>
T __ldcs(const T* from) { return *from; }
template <typename T>
void __stcs(T* to, T v) { *to = v; }
inline float __uint_as_float(uint32_t v) { float to; memcpy(&to, &v, 4); return to; }
inline uint32_t __float_as_uint(float v) { uint32_t to; memcpy(&to, &v, 4); return to; }

// One thread of the machine runs everything, so plain additions are atomic.
inline float atomicAdd(float* to, float v) { const float old = *to; *to += v; return old; }
inline double atomicAdd(double* to, double v) { const double old = *to; *to += v; return old; }
inline float4 atomicAdd(float4* to, float4 v) {
  const float4 old = *to;
  to->x += v.x, to->y += v.y, to->z += v.z, to->w += v.w;
  return old;
}

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

struct __half { _Float16 v; };
inline float __half2float(__half v) { return static_cast<float>(v.v); }
inline __half __float2half_rn(float v) { return {static_cast<_Float16>(v)}; }
inline __half __ushort_as_half(unsigned short bits) { __half to; memcpy(&to, &bits, 2); return to; }
inline unsigned short __half_as_ushort(__half v) { unsigned short to; memcpy(&to, &v, 2); return to; }

namespace msda {
template <int kThreads = 256, typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t, const Arguments&... arguments) {
  cuda_host::note(reinterpret_cast<void (*)()>(kernel));
  cuda_host::run(blocks, kThreads, [&] { kernel(arguments...); });
}
}  // namespace msda

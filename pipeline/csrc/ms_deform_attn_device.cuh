// Shared by all CUDA kernels of MSDeformAttn: sizes, conversions, 16-byte vectors, reductions to global memory, launches.
// No torch here: any host program can launch the kernels. The tests run them on the CPU with a header that replaces
// CUDA's (tests/csrc/cuda_host).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "ms_deform_attn.h"

#if defined(__CUDACC__)
#define MSDA_SHARED(Type, name, count) __shared__ Type name[count]
#endif

namespace msda {

constexpr int kMaxLevels = 32;
constexpr int kWarp = 32;
constexpr int kBlock = 256;  // threads
constexpr unsigned kAllLanes = 0xffffffffu;

// Passed by value: the level sizes are in the kernel's constant bank, without a copy or a synchronisation.
struct Geometry {
  int64_t batch, pixels, heads, channels, queries;
  int32_t levels, points;  // points: per level
  int32_t height[kMaxLevels], width[kMaxLevels], start[kMaxLevels];
};

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(double v, double* to) { *to = v; }
__device__ __forceinline__ void narrow(float v, float* to) { *to = v; }
__device__ __forceinline__ void narrow(float v, __half* to) { *to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16* to) { *to = __float2bfloat16_rn(v); }

// Two 16-bit values in a word.
__device__ __forceinline__ float2 unpack(uint32_t word, const __nv_bfloat16*) {  // a bfloat16 is a float's upper half
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack(uint32_t word, const __half*) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16))));
}
__device__ __forceinline__ uint32_t pack(float a, float b, const __nv_bfloat16*) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(a))) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}
__device__ __forceinline__ uint32_t pack(float a, float b, const __half*) {
  return static_cast<uint32_t>(__half_as_ushort(__float2half_rn(a))) |
         static_cast<uint32_t>(__half_as_ushort(__float2half_rn(b))) << 16;
}

// Two adjacent values in one access; the addresses are aligned to both.
__device__ __forceinline__ float2 load_pair(const float* from) { return __ldcs(reinterpret_cast<const float2*>(from)); }
template <typename Value>
__device__ __forceinline__ float2 load_pair(const Value* from) {
  return unpack(__ldcs(reinterpret_cast<const uint32_t*>(from)), from);
}
__device__ __forceinline__ void store_pair(float a, float b, float* to) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}
template <typename Value>
__device__ __forceinline__ void store_pair(float a, float b, Value* to) {
  *reinterpret_cast<uint32_t*>(to) = pack(a, b, to);
}

template <typename Value>
constexpr int kVector = 16 / sizeof(Value);  // values in 16 bytes

// 16 aligned bytes of a tensor that the kernel does not write, as floats.
__device__ __forceinline__ void load_vector(const float* from, float (&to)[4]) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(from));
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
template <typename Value>
__device__ __forceinline__ void load_vector(const Value* from, float (&to)[8]) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(from));
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i], from);
    to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
  }
}

// The output is not read again soon, so it should not evict the maps from the caches.
__device__ __forceinline__ void store_vector(const float (&v)[4], float* to) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
}
template <typename Value>
__device__ __forceinline__ void store_vector(const float (&v)[8], Value* to) {
  __stcs(reinterpret_cast<uint4*>(to), make_uint4(pack(v[0], v[1], to), pack(v[2], v[3], to), pack(v[4], v[5], to),
                                                  pack(v[6], v[7], to)));
}

// Adds scale * v to 16-byte aligned floats in global memory. From sm_90 on, one reduction adds four floats.
template <int kCount>
__device__ __forceinline__ void add_vector(float scale, const float (&v)[kCount], float* to) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
    atomicAdd(reinterpret_cast<float4*>(to + i),
              make_float4(scale * v[i], scale * v[i + 1], scale * v[i + 2], scale * v[i + 3]));
#else
    for (int j = i; j < i + 4; ++j) atomicAdd(to + j, scale * v[j]);
#endif
  }
}

// Blocks for `count` items with `per_block` in each; the number can be limited, because the kernels stride.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < 0x7fffffff ? blocks : 0x7fffffff);
}

#if defined(__CUDACC__)
template <int kThreads = kBlock, typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, cudaStream_t stream, const Arguments&... arguments) {
  kernel<<<blocks, kThreads, 0, stream>>>(arguments...);
}
#endif

}  // namespace msda

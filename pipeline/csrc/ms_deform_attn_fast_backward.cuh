// The fast backward kernel: rows, lanes and samples as in the forward. The gradients of a point come from four products
// <grad_output, pixel>, which the lanes of a row sum together. Rows of grad_value are accumulated with one reduction per 16
// bytes, if the GPU supports that.

#pragma once

#include "ms_deform_attn_fast.cuh"

namespace msda {

constexpr int kMaxFusedPoints = 32;  // levels * points of the fused backward, which keeps the attention's gradients of a row

// Sums dot[0..3] over the kLanes lanes of a group into to[0..3]. Lanes exchange halves, so four sums cost little more than
// one.
template <int kLanes>
__device__ __forceinline__ void reduce_dots(const float (&dot)[4], int member, float* to) {
  const bool upper = member & (kLanes / 2);
  float a = upper ? dot[2] : dot[0], b = upper ? dot[3] : dot[1];
  a += __shfl_xor_sync(kAllLanes, upper ? dot[0] : dot[2], kLanes / 2);
  b += __shfl_xor_sync(kAllLanes, upper ? dot[1] : dot[3], kLanes / 2);
  if constexpr (kLanes == 2) {
    to[upper ? 2 : 0] = a;
    to[upper ? 3 : 1] = b;
  } else {
    const bool second = member & (kLanes / 4);
    float sum = second ? b : a;
    sum += __shfl_xor_sync(kAllLanes, second ? a : b, kLanes / 4);
    sum = group_sum<kLanes / 4>(sum);
    if (member % (kLanes / 4) == 0) to[(upper ? 2 : 0) + (second ? 1 : 0)] = sum;
  }
}

// A lane's share of a row of grad_output, as it is added to grad_value. This one is what the lane has read already.
template <typename Value, int kLanes, bool kSectors>
struct Share {
  static constexpr int kFirst = kVector<Value>;  // the lane's first channel over its number
  const float (&grad)[kVector<Value>];

  __device__ __forceinline__ Share(const Value*, int, const float (&read)[kVector<Value>]) : grad(read) {}
  __device__ __forceinline__ void add(float scale, float* to) const { add_vector(scale, grad, to); }
};

// 16-bit types with full sectors: 4 channels in each half of the row, because the lanes' 16-byte reductions then are
// adjacent. As above they would each fill half of a sector of 32 bytes, and it is sectors that a GPU reduces.
template <typename Value, int kLanes>
struct Share<Value, kLanes, true> {
  static constexpr int kFirst = 4;
  uint2 low, high;  // packed, because registers are few

  __device__ __forceinline__ Share(const Value* row, int member, const float (&)[kVector<Value>])
      : low(__ldg(reinterpret_cast<const uint2*>(row + 4 * member))),
        high(__ldg(reinterpret_cast<const uint2*>(row + 4 * (kLanes + member)))) {}
  __device__ __forceinline__ void add(float scale, float* to) const {
    const Value* const type = nullptr;
    const float2 a = unpack(low.x, type), b = unpack(low.y, type), c = unpack(high.x, type), d = unpack(high.y, type);
    const float first[4] = {a.x, a.y, b.x, b.y}, second[4] = {c.x, c.y, d.x, d.y};
    add_vector(scale, first, to);
    add_vector(scale, second, to + 4 * kLanes);
  }
};

// `grad_value` (fp32, zeroed) is null if not wanted. It is accumulated in no fixed order. kSectors: see Share.
template <typename Value, int kLanes, typename Points, bool kSectors>
__global__ void __launch_bounds__(kBlock, 3)
    fast_backward_kernel(const Geometry g, const Tiles tiles, const Value* __restrict__ grad_output,
                         const Value* __restrict__ value, const Points points, float* __restrict__ grad_value) {
  constexpr int kCount = kVector<Value>, kWider = sizeof(float) / sizeof(Value);
  MSDA_SHARED(Sample, samples, kBlock);
  MSDA_SHARED(float4, dots, kBlock);
  MSDA_SHARED(float, kept, (Points::kFused ? kBlock / kLanes * kMaxFusedPoints : 1));
  const Place<kLanes> place(g, tiles);
  const int strip = static_cast<int>(threadIdx.x) - place.member;  // not padded: padding costs registers and causes spills
  const int count = g.levels * g.points;
  const int64_t base = (place.image * g.pixels * g.heads + place.head) * g.channels;
  const int32_t pitch = static_cast<int32_t>(g.heads * g.channels * sizeof(Value));
  using Added = Share<Value, kLanes, kSectors>;
  const Value* const map = value + base + place.member * kCount;
  float* const grad_map = grad_value == nullptr ? nullptr : grad_value + base + place.member * Added::kFirst;
  for (int from = place.first; from < tiles.size; from += kBlock / kLanes) {  // the same for the whole warp
    const int64_t query = tile_query(g, tiles, place.tile, place.slot(from));
    if (!__any_sync(kAllLanes, query >= 0)) continue;
    const Row row = place.row(g, query);
    const Softmax softmax = points.template softmax<kLanes>(g, row, place.member);
    float grad[kCount];
    const Value* const grad_row = grad_output + row.index * g.channels;
    load_vector(grad_row + place.member * kCount, grad);
    const Added added(grad_row, place.member, grad);
    float total = 0.f;  // of attention times its gradient, over this lane's points
    for (int begin = 0; begin < count; begin += kLanes) {
      const int k = begin + place.member;
      const bool mine = k < count && query >= 0;
      const int level = mine ? k / g.points : 0;
      Point point{};  // off the map
      if (mine) point = points.read(g, row, k, level, softmax);
      __syncwarp();  // the previous samples and products have been read
      samples[threadIdx.x] = make_sample(g.start[level], g.width[level], pitch, point);
      __syncwarp();
#pragma unroll(kLanes < 4 ? kLanes : 2)
      for (int i = 0; i < kLanes; ++i) {
        const int4 offset = samples[strip + i].offset;
        float dot[4] = {};
        if (offset.x >= 0) {
          const float4 weight = samples[strip + i].weight;
          const int32_t offsets[4] = {offset.x, offset.y, offset.z, offset.w};
          const float weights[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            float pixel[kCount];
            load_vector(behind(map, offsets[corner]), pixel);
#pragma unroll
            for (int c = 0; c < kCount; ++c) dot[corner] += grad[c] * pixel[c];
          }
          if (grad_map != nullptr) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner)
              if (weights[corner] != 0.f) added.add(weights[corner], behind(grad_map, offsets[corner] * kWider));
          }
        }
        reduce_dots<kLanes>(dot, place.member, reinterpret_cast<float*>(dots + strip + i));
      }
      __syncwarp();
      if (mine) {
        const float4 dot = dots[threadIdx.x];
        const PointGradient<float> gradient =
            point_gradient(point.x, point.y, point.attention, dot.x, dot.y, dot.z, dot.w);
        points.write(g, row, k, level, gradient);
        if constexpr (Points::kFused) {
          kept[strip / kLanes * kMaxFusedPoints + k] = gradient.weight;
          total += point.attention * gradient.weight;
        }
      }
    }
    if constexpr (Points::kFused) {  // through the softmax; a lane reads only its own values
      total = group_sum<kLanes>(total);
#pragma unroll 1
      for (int k = place.member; k < count && query >= 0; k += kLanes) {
        const float attention = points.attention(g, row, k, softmax);
        points.write_logit(g, row, k, attention * (kept[strip / kLanes * kMaxFusedPoints + k] - total));
      }
    }
  }
}

}  // namespace msda

// Reads a row's points for the fast kernels and writes the points' gradients. Plain: locations in [0, 1] and weights.
// Fused: reference points, raw offsets in pixels of each level (or in fractions of a reference box) and logits. They
// include the softmax over all points of a row and its derivative.

#pragma once

#include "ms_deform_attn_device.cuh"

namespace msda {

// The work of a group of lanes.
struct Row {
  int64_t query;  // over all images
  int64_t index;  // query * heads + head
};

struct Point {
  Axis<float> x, y;
  float attention;
};

// From offsets to pixels on one axis. The reference is a point (`size` 2: x, y) or a box (4: x, y, width, height).
template <typename Real>
__device__ __forceinline__ Placement<Real> placement(const Geometry& g, const Real* reference, int size, int level,
                                                     int along) {
  const int32_t extent = along == 0 ? g.width[level] : g.height[level];
  return size == 2 ? around_point(reference[along], extent)
                   : around_box(reference[along], reference[2 + along], extent, g.points);
}

// A point off the map has a gradient of 0, even if its factor is infinite or NaN.
template <typename Real>
__device__ __forceinline__ Real scaled(Real gradient, Real scale) {
  return gradient == Real(0) ? Real(0) : gradient * scale;
}

struct Softmax {
  float top, scale;  // the maximum logit; 1 / sum of exp(logit - top)
};

// Sum or maximum over the kLanes adjacent lanes that share a row. All lanes of the warp must call it.
template <int kLanes>
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}
// Returns NaN if either is NaN, as in torch's softmax: the following sum is then NaN.
template <int kLanes>
__device__ __forceinline__ float group_max(float v) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, v, distance);
    v = other > v ? other : v;
  }
  return v;
}

template <typename Value>
struct PlainPoints {
  static constexpr bool kFused = false;
  const float *locations, *weights;
  float *grad_locations, *grad_weights;  // null: not wanted

  template <int kLanes>
  __device__ __forceinline__ Softmax softmax(const Geometry&, const Row&, int) const {
    return {0.f, 0.f};
  }
  __device__ __forceinline__ Point read(const Geometry& g, const Row& row, int k, int level, const Softmax&) const {
    const int64_t index = row.index * (g.levels * g.points) + k;
    const float2 location = load_pair(locations + 2 * index);
    return {axis(location.x, g.width[level]), axis(location.y, g.height[level]), __ldcs(weights + index)};
  }
  // `v` is with respect to the coordinate that the slopes of the point's axes refer to.
  __device__ __forceinline__ void write(const Geometry& g, const Row& row, int k, int, const PointGradient<float>& v) const {
    const int64_t index = row.index * (g.levels * g.points) + k;
    if (grad_locations != nullptr) store_pair(v.x, v.y, grad_locations + 2 * index);
    if (grad_weights != nullptr) grad_weights[index] = v.weight;
  }
  __device__ __forceinline__ float attention(const Geometry&, const Row&, int, const Softmax&) const { return 0.f; }
  __device__ __forceinline__ void write_logit(const Geometry&, const Row&, int, float) const {}
};

template <typename Value>
struct FusedPoints {
  static constexpr bool kFused = true;
  const float* references;  // [N, Q, L, size]
  int32_t size;             // 2: points (x, y); 4: boxes (x, y, width, height)
  const Value *offsets, *logits;
  float* grad_references;  // zeroed; any gradient may be null: not wanted
  Value *grad_offsets, *grad_logits;

  template <int kLanes>
  __device__ __forceinline__ Softmax softmax(const Geometry& g, const Row& row, int member) const {
    const int count = g.levels * g.points;
    const Value* mine = logits + row.index * count;
    float top = -INFINITY, sum = 0.f;
#pragma unroll 1
    for (int k = member; k < count; k += kLanes) {
      const float logit = widen(mine[k]);
      top = logit > top ? logit : top;
    }
    top = group_max<kLanes>(top);
#pragma unroll 1
    for (int k = member; k < count; k += kLanes) sum += expf(widen(mine[k]) - top);
    return {top, 1.f / group_sum<kLanes>(sum)};
  }
  __device__ __forceinline__ float attention(const Geometry& g, const Row& row, int k, const Softmax& s) const {
    return expf(widen(logits[row.index * (g.levels * g.points) + k]) - s.top) * s.scale;
  }
  __device__ __forceinline__ Point read(const Geometry& g, const Row& row, int k, int level, const Softmax& s) const {
    const float* const reference = references + (row.query * g.levels + level) * size;
    const float2 offset = load_pair(offsets + 2 * (row.index * (g.levels * g.points) + k));
    const Placement<float> x = placement(g, reference, size, level, 0), y = placement(g, reference, size, level, 1);
    return {axis_at(x.base + x.scale * offset.x, g.width[level]), axis_at(y.base + y.scale * offset.y, g.height[level]),
            attention(g, row, k, s)};
  }
  // `v` is with respect to pixels. The caller keeps the attention's gradient until the whole row is known.
  __device__ __forceinline__ void write(const Geometry& g, const Row& row, int k, int level,
                                        const PointGradient<float>& v) const {
    const int64_t index = row.index * (g.levels * g.points) + k, first = (row.query * g.levels + level) * size;
    const Placement<float> x = placement(g, references + first, size, level, 0);
    const Placement<float> y = placement(g, references + first, size, level, 1);
    if (grad_offsets != nullptr) store_pair(scaled(v.x, x.scale), scaled(v.y, y.scale), grad_offsets + 2 * index);
    if (grad_references != nullptr) {
      atomicAdd(grad_references + first, v.x * static_cast<float>(g.width[level]));
      atomicAdd(grad_references + first + 1, v.y * static_cast<float>(g.height[level]));
      if (size == 4) {
        const float2 offset = load_pair(offsets + 2 * index);
        atomicAdd(grad_references + first + 2, scaled(v.x, offset.x * x.spread));
        atomicAdd(grad_references + first + 3, scaled(v.y, offset.y * y.spread));
      }
    }
  }
  __device__ __forceinline__ void write_logit(const Geometry& g, const Row& row, int k, float gradient) const {
    if (grad_logits != nullptr) narrow(gradient, grad_logits + row.index * (g.levels * g.points) + k);
  }
};

}  // namespace msda

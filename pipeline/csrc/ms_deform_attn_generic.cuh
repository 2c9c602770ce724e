// The CUDA kernels for any size, type and alignment, with 64-bit offsets. A warp owns one (image, query, head); its lanes
// stride over the channels, so they read a row of a map contiguously.

#pragma once

#include "ms_deform_attn_device.cuh"

namespace msda {

// Offset in `value` of the channels of one head of one image's pixel.
__device__ __forceinline__ int64_t row_offset(const Geometry& g, int64_t image, int64_t head, int32_t pixel) {
  return ((image * g.pixels + pixel) * g.heads + head) * g.channels;
}

// The four pixels of a point, as offsets into `value`: (y low, x low), (low, high), (high, low), (high, high).
template <typename Real>
__device__ __forceinline__ void corner_offsets(const Geometry& g, int64_t image, int64_t head, int level,
                                               const Axis<Real>& x, const Axis<Real>& y, int64_t (&offset)[4]) {
  const int32_t low = g.start[level] + y.low * g.width[level], high = g.start[level] + y.high * g.width[level];
  offset[0] = row_offset(g, image, head, low + x.low);
  offset[1] = row_offset(g, image, head, low + x.high);
  offset[2] = row_offset(g, image, head, high + x.low);
  offset[3] = row_offset(g, image, head, high + x.high);
}

template <typename Value, typename Real>
__global__ void __launch_bounds__(kBlock)
    forward_kernel(const Geometry g, const Value* __restrict__ value, const Real* __restrict__ locations,
                   const Real* __restrict__ weights, Value* __restrict__ output) {
  const int64_t rows = g.batch * g.queries * g.heads, stride = int64_t{gridDim.x} * (kBlock / kWarp);
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t{blockIdx.x} * (kBlock / kWarp) + threadIdx.x / kWarp; row < rows; row += stride) {
    const int64_t head = row % g.heads, image = row / (g.heads * g.queries);
    for (int64_t channel = lane; channel < g.channels; channel += kWarp) {
      Real sum = 0;
      int64_t point = row * g.levels * g.points;
      for (int level = 0; level < g.levels; ++level) {
        for (int p = 0; p < g.points; ++p, ++point) {
          const Axis<Real> x = axis(locations[2 * point], g.width[level]);
          const Axis<Real> y = axis(locations[2 * point + 1], g.height[level]);
          if (!(x.inside & y.inside)) continue;
          int64_t offset[4];
          corner_offsets(g, image, head, level, x, y, offset);
          const Real low = x.weight_low * widen(value[offset[0] + channel]) +
                           x.weight_high * widen(value[offset[1] + channel]);
          const Real high = x.weight_low * widen(value[offset[2] + channel]) +
                            x.weight_high * widen(value[offset[3] + channel]);
          sum += weights[point] * (y.weight_low * low + y.weight_high * high);
        }
      }
      narrow(sum, output + row * g.channels + channel);
    }
  }
}

// `grad_value` (zeroed, of the accumulation type), `grad_locations` and `grad_weights` may be null. Rows of grad_value
// are accumulated atomically, in no fixed order; each element of the other two has one writer.
template <typename Value, typename Real>
__global__ void __launch_bounds__(kBlock)
    backward_kernel(const Geometry g, const Value* __restrict__ grad_output, const Value* __restrict__ value,
                    const Real* __restrict__ locations, const Real* __restrict__ weights, Real* grad_value,
                    Real* grad_locations, Real* grad_weights) {
  const int64_t rows = g.batch * g.queries * g.heads, stride = int64_t{gridDim.x} * (kBlock / kWarp);
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t{blockIdx.x} * (kBlock / kWarp) + threadIdx.x / kWarp; row < rows; row += stride) {
    const int64_t head = row % g.heads, image = row / (g.heads * g.queries);
    int64_t point = row * g.levels * g.points;
    for (int level = 0; level < g.levels; ++level) {
      for (int p = 0; p < g.points; ++p, ++point) {
        const Axis<Real> x = axis(locations[2 * point], g.width[level]);
        const Axis<Real> y = axis(locations[2 * point + 1], g.height[level]);
        const Real attention = weights[point];
        Real dot[4] = {0, 0, 0, 0};
        if (x.inside & y.inside) {  // the same for the whole warp
          int64_t offset[4];
          corner_offsets(g, image, head, level, x, y, offset);
          const Real weight[4] = {y.weight_low * x.weight_low, y.weight_low * x.weight_high,
                                  y.weight_high * x.weight_low, y.weight_high * x.weight_high};
          for (int64_t channel = lane; channel < g.channels; channel += kWarp) {
            const Real grad = widen(grad_output[row * g.channels + channel]);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              dot[corner] += grad * widen(value[offset[corner] + channel]);
              if (grad_value != nullptr && weight[corner] != Real(0))
                atomicAdd(grad_value + offset[corner] + channel, attention * weight[corner] * grad);
            }
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner)
#pragma unroll
            for (int distance = kWarp / 2; distance > 0; distance /= 2)
              dot[corner] += __shfl_xor_sync(kAllLanes, dot[corner], distance);
        }
        if (lane == 0) {
          const PointGradient<Real> gradient = point_gradient(x, y, attention, dot[0], dot[1], dot[2], dot[3]);
          if (grad_locations != nullptr) {
            grad_locations[2 * point] = gradient.x;
            grad_locations[2 * point + 1] = gradient.y;
          }
          if (grad_weights != nullptr) grad_weights[point] = gradient.weight;
        }
      }
    }
  }
}

}  // namespace msda

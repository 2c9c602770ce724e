// The fused operator in steps, for any size and type: `expand` computes the plain kernels' locations and attention
// weights; `fold` converts their gradients to those of offsets and logits, `fold_references` to those of the reference
// points. No atomics: the sums have a fixed order.

#pragma once

#include "ms_deform_attn_points.cuh"

namespace msda {

// Derivative of the location with respect to the offset, along x or y.
template <typename Real>
__device__ __forceinline__ Real offset_scale(const Geometry& g, const Real* reference, int size, int level, int along) {
  return placement(g, reference, size, level, along).scale /
         static_cast<Real>(along == 0 ? g.width[level] : g.height[level]);
}

// One thread per (image, query, head).
template <typename Value, typename Real>
__global__ void __launch_bounds__(kBlock)
    expand_kernel(const Geometry g, int size, const Real* __restrict__ references, const Value* __restrict__ offsets,
                  const Value* __restrict__ logits, Real* __restrict__ locations, Real* __restrict__ weights) {
  const int64_t rows = g.batch * g.queries * g.heads, count = int64_t{g.levels} * g.points;
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kBlock) {
    Real top = -INFINITY, sum = 0;
    for (int64_t k = row * count; k < (row + 1) * count; ++k) {
      const Real logit = widen(logits[k]);
      top = logit > top ? logit : top;
    }
    for (int64_t k = row * count; k < (row + 1) * count; ++k) sum += exp(static_cast<Real>(widen(logits[k])) - top);
    for (int64_t k = row * count; k < (row + 1) * count; ++k) {
      weights[k] = exp(static_cast<Real>(widen(logits[k])) - top) / sum;
      const int level = static_cast<int>((k - row * count) / g.points);
      const Real* const reference = references + (row / g.heads * g.levels + level) * size;
      for (int along = 0; along < 2; ++along)
        locations[2 * k + along] = reference[along] + static_cast<Real>(widen(offsets[2 * k + along])) *
                                                          offset_scale(g, reference, size, level, along);
    }
  }
}

// One thread per (image, query, head). Null: not wanted.
template <typename Value, typename Real>
__global__ void __launch_bounds__(kBlock)
    fold_kernel(const Geometry g, int size, const Real* __restrict__ references, const Real* __restrict__ weights,
                const Real* __restrict__ grad_locations, const Real* __restrict__ grad_weights,
                Value* __restrict__ grad_offsets, Value* __restrict__ grad_logits) {
  const int64_t rows = g.batch * g.queries * g.heads, count = int64_t{g.levels} * g.points;
  for (int64_t row = int64_t{blockIdx.x} * kBlock + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kBlock) {
    if (grad_logits != nullptr) {
      Real total = 0;
      for (int64_t k = row * count; k < (row + 1) * count; ++k) total += weights[k] * grad_weights[k];
      for (int64_t k = row * count; k < (row + 1) * count; ++k)
        narrow(weights[k] * (grad_weights[k] - total), grad_logits + k);
    }
    if (grad_offsets != nullptr) {
      for (int64_t k = row * count; k < (row + 1) * count; ++k) {
        const int level = static_cast<int>((k - row * count) / g.points);
        const Real* const reference = references + (row / g.heads * g.levels + level) * size;
        for (int along = 0; along < 2; ++along)
          narrow(scaled(grad_locations[2 * k + along], offset_scale(g, reference, size, level, along)),
                 grad_offsets + 2 * k + along);
      }
    }
  }
}

// One thread per (image, query, level).
template <typename Value, typename Real>
__global__ void __launch_bounds__(kBlock)
    fold_references_kernel(const Geometry g, int size, const Value* __restrict__ offsets,
                           const Real* __restrict__ grad_locations, Real* __restrict__ grad_references) {
  const int64_t cells = g.batch * g.queries * g.levels, count = int64_t{g.levels} * g.points;
  for (int64_t cell = int64_t{blockIdx.x} * kBlock + threadIdx.x; cell < cells; cell += int64_t{gridDim.x} * kBlock) {
    const int64_t query = cell / g.levels, level = cell % g.levels;
    Real sum[4] = {0, 0, 0, 0};
    for (int64_t head = 0; head < g.heads; ++head) {
      const int64_t first = (query * g.heads + head) * count + level * g.points;
      for (int64_t k = first; k < first + g.points; ++k) {
        for (int along = 0; along < 2; ++along) {
          const Real gradient = grad_locations[2 * k + along];
          sum[along] += gradient;
          const Real spread = Real(0.5) / static_cast<Real>(g.points);
          sum[2 + along] += scaled(gradient, static_cast<Real>(widen(offsets[2 * k + along])) * spread);
        }
      }
    }
    for (int i = 0; i < size; ++i) grad_references[cell * size + i] = sum[i];
  }
}

}  // namespace msda

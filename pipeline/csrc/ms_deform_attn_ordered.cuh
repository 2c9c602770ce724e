// The gradient of value with one writer per element and a fixed order of the sums, so the bits are always the same. A warp
// owns some rows of one level's map of one image and head. It checks all points of that level and head, 32 at a time in
// the order of queries. Those that touch its rows are added one after the other. For any size and type.

#pragma once

#include "ms_deform_attn_generic.cuh"

namespace msda {

constexpr int kBands = 32;  // maximum per map: more bands check all points more often, fewer leave the GPU idle

// One warp per (image, head, level, band); `grad_value` is zeroed and of the accumulation type.
template <typename Value, typename Real>
__global__ void __launch_bounds__(kBlock)
    ordered_kernel(const Geometry g, const Value* __restrict__ grad_output, const Real* __restrict__ locations,
                   const Real* __restrict__ weights, Real* grad_value) {
  const int64_t owners = g.batch * g.heads * g.levels * kBands;
  const int64_t owner = int64_t{blockIdx.x} * (kBlock / kWarp) + threadIdx.x / kWarp;
  if (owner >= owners) return;  // whole warps
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int32_t band = static_cast<int32_t>(owner % kBands);
  const int level = static_cast<int>(owner / kBands % g.levels);
  const int64_t head = owner / kBands / g.levels % g.heads, image = owner / kBands / g.levels / g.heads;
  const int32_t rows = (g.height[level] - 1) / kBands + 1, first = band * rows;
  const int64_t last = first + int64_t{rows};
  if (first >= g.height[level]) return;
  const int64_t candidates = g.queries * g.points;
  for (int64_t begin = 0; begin < candidates; begin += kWarp) {
    const int64_t mine = begin + lane;
    Axis<Real> x{}, y{};
    Real attention = 0;
    bool touches = false;
    if (mine < candidates) {
      const int64_t row = (image * g.queries + mine / g.points) * g.heads + head;
      const int64_t point = (row * g.levels + level) * g.points + mine % g.points;
      x = axis(locations[2 * point], g.width[level]);
      y = axis(locations[2 * point + 1], g.height[level]);
      attention = weights[point];
      touches = (x.inside & y.inside) && ((y.low >= first && y.low < last) || (y.high >= first && y.high < last));
    }
    for (unsigned left = __ballot_sync(kAllLanes, touches); left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      const int64_t query = image * g.queries + (begin + from) / g.points;
      const Value* const grad = grad_output + (query * g.heads + head) * g.channels;
      const Real factor = __shfl_sync(kAllLanes, attention, from);
      const int32_t columns[2] = {__shfl_sync(kAllLanes, x.low, from), __shfl_sync(kAllLanes, x.high, from)};
      const int32_t lines[2] = {__shfl_sync(kAllLanes, y.low, from), __shfl_sync(kAllLanes, y.high, from)};
      const Real across[2] = {__shfl_sync(kAllLanes, x.weight_low, from), __shfl_sync(kAllLanes, x.weight_high, from)};
      const Real down[2] = {__shfl_sync(kAllLanes, y.weight_low, from), __shfl_sync(kAllLanes, y.weight_high, from)};
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int32_t line = lines[corner / 2];
        const Real weight = down[corner / 2] * across[corner % 2];
        if (line < first || line >= last || weight == Real(0)) continue;
        Real* const to =
            grad_value + row_offset(g, image, head, g.start[level] + line * g.width[level] + columns[corner % 2]);
        // a lane only uses its own channels, so it adds to its own results
        for (int64_t channel = lane; channel < g.channels; channel += kWarp)
          to[channel] += factor * weight * widen(grad[channel]);
      }
    }
  }
}

}  // namespace msda

// The fused forward for known numbers of levels and points around reference points, as published models have them: loops
// over points are unrolled, the softmax stays in registers, the level of a point costs no division, and all inputs of a row
// are loaded at once. A warp whose points are all on the map reads without a branch per point, so that the pixels of several
// points are in flight.

#pragma once

#include "ms_deform_attn_fast.cuh"

namespace msda {

template <typename Value, int kLanes, int kThreads, int kLevels, int kPoints>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    specialised_forward_kernel(const Geometry g, const Tiles tiles, const Value* __restrict__ value,
                               const float* __restrict__ references, const Value* __restrict__ offsets,
                               const Value* __restrict__ logits, Value* __restrict__ output) {
  constexpr int kCount = kVector<Value>, kAll = kLevels * kPoints;
  constexpr int kChunks = kAll / kLanes, kChunkLevels = kLanes / kPoints;  // a chunk has a point for each lane
  static_assert(kAll % kLanes == 0 && (kChunkLevels == 1 || kChunkLevels == 2) && kLanes % kPoints == 0);
  MSDA_SHARED(int4, sample_offsets, (kSamples<kLanes, kThreads>));
  MSDA_SHARED(float4, sample_weights, (kSamples<kLanes, kThreads>));
  const Place<kLanes> place(g, tiles);
  const int32_t pitch = static_cast<int32_t>(g.heads * g.channels * sizeof(Value));
  const Value* const map =
      value + (place.image * g.pixels * g.heads + place.head) * g.channels + place.member * kCount;
  const int upper = kChunkLevels == 1 ? 0 : place.member / kPoints;  // level of the lane's points within a chunk
  for (int from = place.first; from < tiles.size; from += kThreads / kLanes) {  // the same for the whole warp
    const int64_t query = tile_query(g, tiles, place.tile, place.slot(from));
    if (!__any_sync(kAllLanes, query >= 0)) continue;
    const Row row = place.row(g, query);
    const Value* const own_offsets = offsets + 2 * (row.index * kAll + place.member);
    const Value* const own_logits = logits + row.index * kAll + place.member;
    const float2* const own_references = reinterpret_cast<const float2*>(references) + row.query * kLevels + upper;
    float2 pixel[kChunks];
    float attention[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int level = chunk * kChunkLevels + upper;
      const float2 offset = load_pair(own_offsets + 2 * chunk * kLanes);
      const float2 reference = __ldg(own_references + chunk * kChunkLevels);
      pixel[chunk] = make_float2(around_point(reference.x, g.width[level]).base + offset.x,
                                 around_point(reference.y, g.height[level]).base + offset.y);
      attention[chunk] = widen(own_logits[chunk * kLanes]);
    }
    float top = attention[0];
#pragma unroll
    for (int chunk = 1; chunk < kChunks; ++chunk) top = attention[chunk] > top ? attention[chunk] : top;
    top = group_max<kLanes>(top);
    float total = 0.f;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) total += attention[chunk] = expf(attention[chunk] - top);
    const float scale = 1.f / group_sum<kLanes>(total);
    float sum[kCount] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int level = chunk * kChunkLevels + upper;
      const Point point{axis_at(pixel[chunk].x, g.width[level]), axis_at(pixel[chunk].y, g.height[level]),
                        attention[chunk] * scale};
      const Sample sample =
          query >= 0 ? make_sample(g.start[level], g.width[level], pitch, point) : no_sample();
      __syncwarp();  // the previous samples have been read
      sample_offsets[place.strip + place.member] = sample.offset;
      sample_weights[place.strip + place.member] = sample.weight;
      __syncwarp();
      if (__all_sync(kAllLanes, sample.offset.x >= 0)) {  // nearly always
#pragma unroll(kLanes < 8 ? 2 : 4)
        for (int i = 0; i < kLanes; ++i)
          add_sample(map, sample_offsets[place.strip + i], sample_weights[place.strip + i], sum);
      } else {
#pragma unroll 1
        for (int i = 0; i < kLanes; ++i) {
          const int4 at = sample_offsets[place.strip + i];
          if (at.x >= 0) add_sample(map, at, sample_weights[place.strip + i], sum);
        }
      }
    }
    if (query >= 0) store_vector(sum, output + row.index * g.channels + place.member * kCount);
  }
}

}  // namespace msda

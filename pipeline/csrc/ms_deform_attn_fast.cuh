// The fast forward kernel: rows of 32 to 512 bytes that are read 16 bytes per lane, so that kLanes lanes own one (image,
// query, head). A warp owns several of them. Each lane computes the pixels of one point and stores them in shared memory for
// the other lanes, so coordinates are computed once per point. Offsets within an image have 32 bits.

#pragma once

#include "ms_deform_attn_points.cuh"
#include "ms_deform_attn_tiles.cuh"

namespace msda {

// One point: its four pixels, as offsets from the first pixel of the image and head, and their weights.
struct Sample {
  int4 offset;    // in bytes of value; x < 0: off the map, not read
  float4 weight;  // bilinear weight times attention
};

__device__ __forceinline__ Sample no_sample() { return {make_int4(-1, -1, -1, -1), make_float4(0.f, 0.f, 0.f, 0.f)}; }

// `start` and `width` are those of the point's level, `pitch` is the distance of two pixels in bytes.
__device__ __forceinline__ Sample make_sample(int32_t start, int32_t width, int32_t pitch, const Point& point) {
  const Axis<float>&x = point.x, &y = point.y;
  if (!(x.inside & y.inside)) return no_sample();
  const int32_t low = start + y.low * width, high = start + y.high * width;
  const float weight_low = point.attention * y.weight_low, weight_high = point.attention * y.weight_high;
  return {make_int4((low + x.low) * pitch, (low + x.high) * pitch, (high + x.low) * pitch, (high + x.high) * pitch),
          make_float4(weight_low * x.weight_low, weight_low * x.weight_high, weight_high * x.weight_low,
                      weight_high * x.weight_high)};
}

// The address `offset` >= 0 bytes after `base`; unsigned, so that it costs two additions and no shift. Pointers are not
// converted to integers: the compiler would forget that they are global and could not use vector reductions.
__device__ __forceinline__ float* behind(float* base, int32_t offset) {
  return reinterpret_cast<float*>(reinterpret_cast<char*>(base) + static_cast<uint32_t>(offset));
}
template <typename T>
__device__ __forceinline__ const T* behind(const T* base, int32_t offset) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + static_cast<uint32_t>(offset));
}

// The part of the work that a thread does.
template <int kLanes>
struct Place {
  int64_t image, head;
  int32_t tile;
  int member, strip, first;  // lane within the group; the group's samples in shared memory; first slot of the warp

  __device__ __forceinline__ Place(const Geometry& g, const Tiles& t) : Place(g, t, place_of(g, t, blockIdx.x)) {}
  __device__ __forceinline__ Place(const Geometry& g, const Tiles& t, uint32_t block)
      : image(block / t.count / static_cast<unsigned>(g.heads)),
        head(block / t.count % static_cast<unsigned>(g.heads)),
        tile(static_cast<int32_t>(block % t.count)),
        member(static_cast<int>(threadIdx.x) % kLanes),
        strip(static_cast<int>(threadIdx.x) / kLanes * (kLanes + 1)),
        first(static_cast<int>(threadIdx.x) / kWarp * (kWarp / kLanes)) {}

  // A query of -1 is replaced by the image's first, whose inputs may be read.
  __device__ __forceinline__ Row row(const Geometry& g, int64_t query) const {
    const int64_t cell = image * g.queries + (query < 0 ? 0 : query);
    return {cell, cell * g.heads + head};
  }

  // The slot of this thread's group, if the warp's first slot is `first`.
  __device__ __forceinline__ int slot(int from) const { return from + static_cast<int>(threadIdx.x) % kWarp / kLanes; }
};

// The samples of a block, with one more per group than lanes, so that the groups of a warp read different banks.
template <int kLanes, int kThreads = kBlock>
constexpr int kSamples = kThreads / kLanes * (kLanes + 1);

// Adds a lane's channels of the sum of one point's pixels, weighted.
template <typename Value, int kCount>
__device__ __forceinline__ void add_sample(const Value* map, const int4& offset, const float4& weight,
                                           float (&sum)[kCount]) {
  float corner[4][kCount];
  load_vector(behind(map, offset.x), corner[0]);
  load_vector(behind(map, offset.y), corner[1]);
  load_vector(behind(map, offset.z), corner[2]);
  load_vector(behind(map, offset.w), corner[3]);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {  // one fused multiply-add each
    sum[c] += weight.x * corner[0][c];
    sum[c] += weight.y * corner[1][c];
    sum[c] += weight.z * corner[2][c];
    sum[c] += weight.w * corner[3][c];
  }
}

// Points are processed kLanes at a time, so any number of them is supported.
template <typename Value, int kLanes, typename Points>
__global__ void __launch_bounds__(kBlock, 4)
    fast_forward_kernel(const Geometry g, const Tiles tiles, const Value* __restrict__ value, const Points points,
                        Value* __restrict__ output) {
  constexpr int kCount = kVector<Value>;
  MSDA_SHARED(int4, sample_offsets, kSamples<kLanes>);
  MSDA_SHARED(float4, sample_weights, kSamples<kLanes>);
  const Place<kLanes> place(g, tiles);
  const int count = g.levels * g.points;
  const int32_t pitch = static_cast<int32_t>(g.heads * g.channels * sizeof(Value));
  const Value* const map =
      value + (place.image * g.pixels * g.heads + place.head) * g.channels + place.member * kCount;
  for (int from = place.first; from < tiles.size; from += kBlock / kLanes) {  // the same for the whole warp
    const int64_t query = tile_query(g, tiles, place.tile, place.slot(from));
    if (!__any_sync(kAllLanes, query >= 0)) continue;
    const Row row = place.row(g, query);
    const Softmax softmax = points.template softmax<kLanes>(g, row, place.member);
    float sum[kCount] = {};
    for (int begin = 0; begin < count; begin += kLanes) {
      const int k = begin + place.member;
      __syncwarp();  // the previous samples have been read
      Sample sample = no_sample();
      if (k < count && query >= 0) {
        const int level = k / g.points;
        sample = make_sample(g.start[level], g.width[level], pitch, points.read(g, row, k, level, softmax));
      }
      sample_offsets[place.strip + place.member] = sample.offset;
      sample_weights[place.strip + place.member] = sample.weight;
      __syncwarp();
#pragma unroll(kLanes < 4 ? kLanes : 4)
      for (int i = 0; i < kLanes; ++i) {
        const int4 offset = sample_offsets[place.strip + i];
        if (offset.x < 0) continue;
        add_sample(map, offset, sample_weights[place.strip + i], sum);
      }
    }
    if (query >= 0) store_vector(sum, output + row.index * g.channels + place.member * kCount);
  }
}

}  // namespace msda

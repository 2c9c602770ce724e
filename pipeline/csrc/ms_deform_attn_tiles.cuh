// The order in which the fast kernels visit queries. In the encoder the queries are the pixels of the levels. A block
// processes a small rectangle of one level and one head, so that its samples overlap in the L1 cache. Elsewhere it
// processes queries in their order. Blocks process an image head by head before the next image, for reuse in L2.

#pragma once

#include "ms_deform_attn_device.cuh"

namespace msda {

struct Tiles {
  int32_t count, size, log_width;  // tiles per image and head; queries in one; of its width (rectangles only)
  int32_t rectangles;              // whether queries are pixels
  int32_t first[kMaxLevels], columns[kMaxLevels];  // of each level: its first tile, tiles per row
};

// `rows` is the number of queries that a block processes at once.
inline Tiles make_tiles(const Geometry& g, int rows) {
  Tiles t{};
  t.rectangles = g.queries == g.pixels;
  if (!t.rectangles) {
    t.size = rows;
    t.count = static_cast<int32_t>((g.queries + rows - 1) / rows);
    return t;
  }
  t.log_width = rows > 64 ? 4 : 3;
  t.size = 8 << t.log_width;
  for (int level = 0; level < g.levels; ++level) {
    t.first[level] = t.count;
    t.columns[level] = ((g.width[level] - 1) >> t.log_width) + 1;
    t.count += t.columns[level] * ((g.height[level] - 1) / 8 + 1);
  }
  return t;
}

// The query of `slot` in `tile`, or -1 where the tile extends beyond the edge.
__device__ __forceinline__ int64_t tile_query(const Geometry& g, const Tiles& t, int32_t tile, int32_t slot) {
  if (!t.rectangles) {
    const int64_t query = int64_t{tile} * t.size + slot;
    return query < g.queries ? query : -1;
  }
  int level = 0;
  while (level + 1 < g.levels && tile >= t.first[level + 1]) ++level;
  const int32_t inside = tile - t.first[level];
  const int32_t y = inside / t.columns[level] * 8 + (slot >> t.log_width);
  const int32_t x = (inside % t.columns[level] << t.log_width) + (slot & ((1 << t.log_width) - 1));
  return y < g.height[level] && x < g.width[level] ? g.start[level] + int64_t{y} * g.width[level] + x : -1;
}

}  // namespace msda

// The order in which the fast kernels visit queries. In the encoder the queries are the pixels of the levels. A block
// processes a small rectangle of one level and one head, so that its samples overlap in the L1 cache. Elsewhere it
// processes queries in their order. Blocks process an image head by head before the next image, for reuse in L2; with
// `processors`, neighbouring blocks of an image run on one processor, for reuse in L1.

#pragma once

#include "ms_deform_attn_device.cuh"

namespace msda {

struct Tiles {
  int32_t count, size;        // tiles per image and head; queries in one
  int32_t log_width, height;  // of a rectangle
  int32_t rectangles;         // whether queries are pixels
  int32_t processors;         // of the GPU, if its neighbouring blocks shall be neighbours in the image too; else 0
  int32_t first[kMaxLevels], columns[kMaxLevels];  // of each level: its first tile, tiles per row
};

// `rows` is the number of queries that a block processes at once, `large` asks for rectangles of 16 x 16.
inline Tiles make_tiles(const Geometry& g, int rows, bool large, int32_t processors) {
  Tiles t{};
  t.processors = processors;
  t.rectangles = g.queries == g.pixels;
  if (!t.rectangles) {
    t.size = rows;
    t.count = static_cast<int32_t>((g.queries + rows - 1) / rows);
    return t;
  }
  t.log_width = large || rows > 64 ? 4 : 3;
  t.height = large ? 16 : 8;
  t.size = t.height << t.log_width;
  for (int level = 0; level < g.levels; ++level) {
    t.first[level] = t.count;
    t.columns[level] = ((g.width[level] - 1) >> t.log_width) + 1;
    t.count += t.columns[level] * ((g.height[level] - 1) / t.height + 1);
  }
  return t;
}

inline unsigned blocks_of(const Geometry& g, const Tiles& t) {
  return static_cast<unsigned>(t.count * g.heads * g.batch);
}

// The place of a block among the tiles of all images and heads. GPUs deal blocks to their processors in turn, so that
// neighbours would be far apart in every cache: with `processors` each one gets a run of neighbours of an image instead.
__device__ __forceinline__ uint32_t place_of(const Geometry& g, const Tiles& t, uint32_t block) {
  if (t.processors == 0) return block;
  const uint32_t all = static_cast<uint32_t>(t.count * g.heads), processors = static_cast<uint32_t>(t.processors);
  const uint32_t first = block / all * all, turn = (block - first) / processors, processor = (block - first) % processors;
  const uint32_t share = all / processors, rest = all % processors;  // the first `rest` processors get one more
  return first + processor * share + (processor < rest ? processor : rest) + turn;
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
  const int32_t y = inside / t.columns[level] * t.height + (slot >> t.log_width);
  const int32_t x = (inside % t.columns[level] << t.log_width) + (slot & ((1 << t.log_width) - 1));
  return y < g.height[level] && x < g.width[level] ? g.start[level] + int64_t{y} * g.width[level] + x : -1;
}

}  // namespace msda

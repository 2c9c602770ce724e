// What the CPU kernels are given and how the right ones are found; shared by the kernels (compiled once per instruction
// set) and the code that torch calls. No standard library here: an inline function of it compiled for AVX-512 could
// replace the baseline one at link time.

#pragma once

#include <stdint.h>

namespace msda {

constexpr int kPointPadding = 16;  // the per-point arrays of a task are that much longer, with sizes of 1

// One call on one batch, all arrays dense. `points` is L * P, `all_points` that of all rows together; the per-point
// arrays describe the level of each point.
template <typename Real>
struct Task {
  int64_t pixels, heads, channels, queries, points, all_points;
  const int32_t* width;    // [points]
  const int32_t* height;   // [points]
  const int32_t* start;    // [points] first pixel of the level
  const Real* value;       // dense channels; the strides of the rest, in numbers, hold for grad_value too
  int64_t image_stride, head_stride, pixel_stride;
  const Real* locations;   // [N, queries, heads, points, 2]
  const Real* weights;     // [N, queries, heads, points]
};

template <typename Real>
struct Kernels {
  // Rows `begin` to `end` of the N * heads * queries (image, head, query) triples; writes output [N, queries, heads,
  // channels].
  void (*forward)(const Task<Real>& task, Real* output, int64_t begin, int64_t end);
  // (image, head) pairs `begin` to `end`; a pair owns its part of every gradient, so no two threads write one number
  // and the result does not depend on their number. Null for a gradient that is not wanted; grad_value is laid out
  // as value.
  void (*backward)(const Task<Real>& task, const Real* grad_output, Real* grad_value, Real* grad_locations,
                   Real* grad_weights, int64_t begin, int64_t end);
};

struct KernelSet {
  const char* name;
  Kernels<float> single;
  Kernels<double> twice;
};

}  // namespace msda

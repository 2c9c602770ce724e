// The arguments of the CPU kernels and the table of kernels; shared by the kernels, compiled once per instruction set, and
// the code that torch calls. No standard library here: at link time, an inline function compiled for AVX-512 could
// replace the baseline one.

#pragma once

#include <stdint.h>

namespace msda {

constexpr int kPointPadding = 16;  // extra elements of a task's per-point arrays, with sizes of 1

// Elements of scratch that a kernel needs for rows of `points`: four per point, for two rows.
constexpr int64_t scratch_size(int64_t points) { return 2 * 4 * (points + kPointPadding); }

// One call on one batch, all arrays dense. A row is one (image, query, head), `points` is L * P; the per-point arrays
// describe the level of each point. Points are given as locations and weights or, fused, as offsets and logits.
template <typename Real>
struct Task {
  int64_t pixels, heads, channels, queries, levels, points;
  const int32_t* width;    // [points]
  const int32_t* height;   // [points]
  const int32_t* start;    // [points] first pixel of the level
  const Real* value;       // dense channels; the other strides, in elements, also apply to grad_value
  int64_t image_stride, head_stride, pixel_stride;
  const Real* places;      // locations, or fused: offsets [N, queries, heads, points, 2]
  const Real* weights;     // attention weights, or fused: their logits [N, queries, heads, points]
  const Real* references;  // null, or fused: [N, queries, levels, coordinates]
  int64_t coordinates;     // 2 (points) or 4 (boxes)
};

// Null for gradients that are not wanted; same layout as the inputs.
template <typename Real>
struct Gradients {
  Real* value;
  Real* places;
  Real* weights;
  Real* references;  // each head's part: [N, queries, heads, levels, coordinates]
};

template <typename Real>
struct Kernels {
  // Rows `begin` to `end` of the N * heads * queries (image, head, query) triples; writes output [N, queries, heads,
  // channels].
  void (*forward)(const Task<Real>& task, Real* output, Real* scratch, int64_t begin, int64_t end);

  // All gradients of (image, head) pairs `begin` to `end`. A pair owns its part of every gradient: no two threads write
  // the same element, and the result does not depend on the number of threads. The other two functions do the same
  // in two passes, for more threads than pairs: all gradients except value's by rows as above, and value's by (image,
  // head, level) triples.
  void (*backward)(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
                   int64_t begin, int64_t end);
  void (*backward_rows)(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
                        int64_t begin, int64_t end);
  void (*backward_levels)(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
                          int64_t begin, int64_t end);
};

struct KernelSet {
  const char* name;
  Kernels<float> single;
  Kernels<double> twice;
};

}  // namespace msda

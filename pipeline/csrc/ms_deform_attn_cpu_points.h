// The points of a row for the CPU kernels, compiled once per instruction set: the softmax, the coordinates of the points,
// the pixels that they mix, and all derivatives, for a batch of points at a time.

#pragma once

#include "ms_deform_attn.h"
#include "ms_deform_attn_cpu.h"

#if !defined(MSDA_ISA)
#error "compile with -DMSDA_ISA=name"
#endif

namespace msda {
namespace MSDA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kStep = kVectorBytes / 4;  // points whose coordinates are computed at once
constexpr int kBatch = 32;               // points resolved before their rows are read; the usual L * P is 16
constexpr int kAhead = 4;               // queries between prefetching inputs and using them
constexpr int kLine = 64;               // bytes of a cache line
constexpr int kWays = 4;                // independent partial sums
static_assert(kBatch % kStep == 0 && kPointPadding % kStep == 0, "whole steps");

#define MSDA_LOCAL static inline __attribute__((always_inline))

template <typename Type>
using Step __attribute__((vector_size(kStep * sizeof(Type)))) = Type;

// into[0:kStep] = e^(values - highest), for values <= highest, and NaN for NaN; within 2 units in the last place. Below
// e^-87 it is 0. Above highest (unused lanes) it is 1.
MSDA_LOCAL void exponentials(const float* values, float highest, float* into) {
  Step<float> x;
  __builtin_memcpy(&x, values, sizeof(x));
  x -= highest;
  const Step<int32_t> number = x == x, tiny = x < -87.0f;
  const Step<int32_t> usable = number & ~tiny & (x < 0.0f);
  const Step<float> r = reinterpret_cast<Step<float>>(reinterpret_cast<Step<int32_t>>(x) & usable);  // others: 0
  const Step<int32_t> power = __builtin_convertvector(r * 1.44269504f - 0.5f, Step<int32_t>);  // of two
  const Step<float> n = __builtin_convertvector(power, Step<float>);
  const Step<float> rest = (r - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Step<float> y = rest * 1.9875691500e-4f + 1.3981999507e-3f;  // minimax polynomial of e^r on |r| <= ln(2) / 2
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  y *= reinterpret_cast<Step<float>>((power + 127) << 23);
  const Step<int32_t> bits = (reinterpret_cast<Step<int32_t>>(y) & ~tiny & number) |
                             (reinterpret_cast<Step<int32_t>>(x) & ~number);
  __builtin_memcpy(into, &bits, sizeof(bits));
}
MSDA_LOCAL void exponentials(const double* values, double highest, double* into) {
  for (int i = 0; i < kStep; ++i) into[i] = __builtin_exp(values[i] - highest);
}

// Prefetches inputs of a later row: one head's rows are too far apart for the hardware prefetcher.
template <typename Real>
MSDA_LOCAL void prefetch(const Real* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / static_cast<int64_t>(sizeof(Real))) __builtin_prefetch(from + i);
}

// Offset of an (image, head) pair in value.
template <typename Real>
MSDA_LOCAL int64_t pair_base(const Task<Real>& task, int64_t pair) {
  return pair / task.heads * task.image_stride + pair % task.heads * task.head_stride;
}

// The index-th (image, head, query) in the order of the passes.
struct Place {
  int64_t pair, query, row;  // query: over all images; row: index of (image, query, head), the tensors' order

  template <typename Real>
  MSDA_INLINE Place(const Task<Real>& task, int64_t index)
      : pair(index / task.queries),
        query(pair / task.heads * task.queries + index % task.queries),
        row(query * task.heads + pair % task.heads) {}
  template <typename Real>
  MSDA_INLINE int64_t base(const Task<Real>& task) const {
    return pair_base(task, pair);
  }
};

// The points of one row: pixel coordinates and attention weights, in the caller's scratch, and their backward.
template <typename Real>
class Placed {
 public:
  Real* const x;
  Real* const y;
  Real* const weight;
  Real* const weight_grad;

  MSDA_INLINE Placed(const Task<Real>& task, Real* scratch)
      : x(scratch),
        y(x + task.points + kPointPadding),
        weight(y + task.points + kPointPadding),
        weight_grad(weight + task.points + kPointPadding),
        per_level(static_cast<int>(task.levels > 0 ? task.points / task.levels : 0)) {
    for (int64_t i = task.points; i < task.points + kPointPadding; ++i) x[i] = y[i] = weight[i] = 0;
  }

  MSDA_INLINE void place(const Task<Real>& task, const Place& at) {
    if (task.points == 0) return;  // the inputs may be null then
    const Real* places = task.places + 2 * at.row * task.points;
    const Real* weights = task.weights + at.row * task.points;
    prefetch(places + kAhead * task.heads * 2 * task.points, 2 * task.points);
    prefetch(weights + kAhead * task.heads * task.points, task.points);
    if (task.references == nullptr) {
#pragma GCC ivdep
      for (int64_t i = 0; i < task.points; ++i) {
        x[i] = places[2 * i] * static_cast<Real>(task.width[i]) - Real(0.5);
        y[i] = places[2 * i + 1] * static_cast<Real>(task.height[i]) - Real(0.5);
      }
      __builtin_memcpy(weight, weights, task.points * sizeof(Real));
      return;
    }
    const Real* reference = task.references + at.query * task.levels * task.coordinates;
    int64_t i = 0;
    for (int64_t level = 0; level < task.levels; ++level, reference += task.coordinates) {
      const Placement<Real> column = placement(task, reference, 0, task.width[i]);
      const Placement<Real> line = placement(task, reference, 1, task.height[i]);
      for (const int64_t end = i + per_level; i < end; ++i) {
        x[i] = column.base + column.scale * places[2 * i];
        y[i] = line.base + line.scale * places[2 * i + 1];
      }
    }
    softmax(weights, task.points);
  }

  // From the gradients of the pixel coordinates of points `first` to `last` to the gradients of places and references; the
  // latter is accumulated.
  MSDA_INLINE void chain(const Task<Real>& task, const Place& at, int64_t first, int64_t last, const Real* x_grad,
                         const Real* y_grad, const Gradients<Real>& into) const {
    Real* places = into.places == nullptr ? nullptr : into.places + 2 * at.row * task.points;
    if (task.references == nullptr) {
      if (places != nullptr)
#pragma GCC ivdep
        for (int64_t i = first; i < last; ++i) {
          places[2 * i] = x_grad[i - first] * static_cast<Real>(task.width[i]);
          places[2 * i + 1] = y_grad[i - first] * static_cast<Real>(task.height[i]);
        }
      return;
    }
    if (task.coordinates == 2 && into.references == nullptr) {  // offsets are pixels, and there is nothing to sum
      if (places != nullptr)
#pragma GCC ivdep
        for (int64_t i = first; i < last; ++i) {
          places[2 * i] = x_grad[i - first];
          places[2 * i + 1] = y_grad[i - first];
        }
      return;
    }
    const Real* offsets = task.places + 2 * at.row * task.points;
    const Real* references = task.references + at.query * task.levels * task.coordinates;
    for (int64_t i = first, level = first / (per_level > 0 ? per_level : 1); i < last; ++level) {
      const int64_t end = (level + 1) * per_level < last ? (level + 1) * per_level : last;
      const Real* reference = references + level * task.coordinates;
      const Placement<Real> column = placement(task, reference, 0, task.width[i]);
      const Placement<Real> line = placement(task, reference, 1, task.height[i]);
      Real shift[2] = {0, 0}, grow[2] = {0, 0};
      const int64_t begin = i;
      if (places != nullptr)
        for (; i < end; ++i) {  // a point off the map has gradients of 0; 0 * inf must not make them NaN
          const Real gx = x_grad[i - first], gy = y_grad[i - first];
          places[2 * i] = gx != 0 ? gx * column.scale : Real(0);
          places[2 * i + 1] = gy != 0 ? gy * line.scale : Real(0);
        }
      i = end;
      if (into.references == nullptr) continue;
      for (int64_t p = begin; p < end; ++p) {
        const Real gx = x_grad[p - first], gy = y_grad[p - first];
        shift[0] += gx;
        shift[1] += gy;
        grow[0] += gx != 0 ? gx * offsets[2 * p] : Real(0);
        grow[1] += gy != 0 ? gy * offsets[2 * p + 1] : Real(0);
      }
      Real* to = into.references + (at.row * task.levels + level) * task.coordinates;
      to[0] += shift[0] * static_cast<Real>(task.width[begin]);
      to[1] += shift[1] * static_cast<Real>(task.height[begin]);
      if (task.coordinates == 4) {
        to[2] += grow[0] * column.spread;
        to[3] += grow[1] * line.spread;
      }
    }
  }

  // From weight_grad to the gradients of weights or, fused, of logits.
  MSDA_INLINE void chain_weights(const Task<Real>& task, const Place& at, const Gradients<Real>& into) const {
    Real* to = into.weights + at.row * task.points;
    if (task.references == nullptr) {
      __builtin_memcpy(to, weight_grad, task.points * sizeof(Real));
      return;
    }
    const Real mean = total(task.points, [this](int64_t i) { return weight[i] * weight_grad[i]; });
#pragma GCC ivdep
    for (int64_t i = 0; i < task.points; ++i) to[i] = weight[i] * (weight_grad[i] - mean);
  }

 private:
  const int per_level;

  MSDA_INLINE Placement<Real> placement(const Task<Real>& task, const Real* reference, int axis, int32_t size) const {
    return task.coordinates == 4 ? around_box(reference[axis], reference[2 + axis], size, per_level)
                                 : around_point(reference[axis], size);
  }

  // weight = softmax(logits). A logit of NaN or infinity makes all weights NaN, as in torch.
  MSDA_INLINE void softmax(const Real* logits, int64_t points) {
    Real high[kWays];
    for (int way = 0; way < kWays; ++way) high[way] = points > 0 ? logits[0] : Real(0);
    int64_t i = 0;
    for (; i + kWays <= points; i += kWays)
      for (int way = 0; way < kWays; ++way) high[way] = logits[i + way] > high[way] ? logits[i + way] : high[way];
    for (; i < points; ++i) high[0] = logits[i] > high[0] ? logits[i] : high[0];
    for (int way = 1; way < kWays; ++way) high[0] = high[way] > high[0] ? high[way] : high[0];
    for (i = 0; i + kStep <= points; i += kStep) exponentials(logits + i, high[0], weight + i);
    if (i < points) {
      __builtin_memcpy(weight + i, logits + i, (points - i) * sizeof(Real));
      exponentials(weight + i, high[0], weight + i);
    }
    const Real share = Real(1) / total(points, [this](int64_t k) { return weight[k]; });
    for (int64_t k = 0; k < points; ++k) weight[k] *= share;
  }

  // Sum of term(0) to term(count - 1) in kWays partial sums: a single sum would wait for each addition.
  template <typename Term>
  static MSDA_INLINE Real total(int64_t count, const Term& term) {
    Real sum[kWays] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + kWays <= count; i += kWays)
      for (int way = 0; way < kWays; ++way) sum[way] += term(i + way);
    for (; i < count; ++i) sum[0] += term(i);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

// Some points of one row, resolved to pixels. The four pixels of a point: (y low, x low), (low, high), (high, low),
// (high, high). `order` omits points off the map, because a branch on them would be hard to predict.
template <typename Real>
class Points {
 public:
  alignas(kLine) int32_t row[4][kBatch];
  Real weight[4][kBatch];               // bilinear times attention
  Real dot[kBatch][4];                  // <grad_output, pixel>
  Real x_grad[kBatch], y_grad[kBatch];  // of the pixel coordinates of all points, in their original order
  int32_t order[kBatch];
  int count;  // in `order`

  // Points `first_point` to `first_point + size` of a row; whole steps are computed, because the arrays are padded.
  MSDA_INLINE void resolve(const Task<Real>& task, const Placed<Real>& placed, int64_t first_point, int size) {
    first = first_point;
    steps = (size + kStep - 1) / kStep * kStep;
    const Real* x_pixel = placed.x + first;
    const Real* y_pixel = placed.y + first;
    const Real* attention = placed.weight + first;
    const int32_t* width = task.width + first;
    const int32_t* height = task.height + first;
    const int32_t* start = task.start + first;
    alignas(kLine) int32_t inside[kBatch];
    for (int step = 0; step < steps; step += kStep) {
#pragma GCC ivdep
      for (int i = step; i < step + kStep; ++i) {
        const Axis<Real> x = axis_at(x_pixel[i], width[i]);
        const Axis<Real> y = axis_at(y_pixel[i], height[i]);
        const int32_t low = start[i] + y.low * width[i], high = start[i] + y.high * width[i];
        row[0][i] = low + x.low;
        row[1][i] = low + x.high;
        row[2][i] = high + x.low;
        row[3][i] = high + x.high;
        const Real top = y.weight_low * attention[i], bottom = y.weight_high * attention[i];
        weight[0][i] = top * x.weight_low;
        weight[1][i] = top * x.weight_high;
        weight[2][i] = bottom * x.weight_low;
        weight[3][i] = bottom * x.weight_high;
        inside[i] = x.inside & y.inside;
      }
    }
    count = 0;
    for (int i = 0; i < size; ++i) {
      order[count] = i;
      count += inside[i];
    }
  }

  MSDA_INLINE void clear_dots() { __builtin_memset(dot, 0, steps * sizeof(dot[0])); }

  // From the dots to the gradients; a point that is not in `order` has dots and gradients of 0.
  MSDA_INLINE void differentiate(const Task<Real>& task, const Placed<Real>& placed) {
    const int32_t* width = task.width + first;
    const int32_t* height = task.height + first;
    for (int step = 0; step < steps; step += kStep) {
#pragma GCC ivdep
      for (int i = step; i < step + kStep; ++i) {
        const PointGradient<Real> gradient =
            point_gradient(axis_at(placed.x[first + i], width[i]), axis_at(placed.y[first + i], height[i]),
                           placed.weight[first + i], dot[i][0], dot[i][1], dot[i][2], dot[i][3]);
        x_grad[i] = gradient.x;
        y_grad[i] = gradient.y;
        placed.weight_grad[first + i] = gradient.weight;
      }
    }
  }

 private:
  int64_t first;
  int steps;
};

}  // namespace MSDA_ISA
}  // namespace msda

// The CPU kernels of MSDeformAttn, compiled once per instruction set (MSDA_ISA names it; recipe.py has the flags).
//
// Channels are contiguous, so a pixel is a few vectors and no gather is needed. Each point is four pixels times four
// weights, summed in registers. The backward needs only the four products <grad_output, pixel> of a point.

#include "ms_deform_attn_cpu_points.h"

#define MSDA_TEXT_(x) #x
#define MSDA_TEXT(x) MSDA_TEXT_(x)

namespace msda {
namespace MSDA_ISA {

template <typename Real, int Lanes>
struct Lane {
  typedef Real Vector __attribute__((vector_size(Lanes * sizeof(Real))));
};

// `Width` channels as vectors.
template <typename Real, int Width>
struct Row {
  static constexpr int kLanes =
      Width * sizeof(Real) < kVectorBytes ? Width : kVectorBytes / static_cast<int>(sizeof(Real));
  static constexpr int kVectors = Width / kLanes;
  using Vector = typename Lane<Real, kLanes>::Vector;

  static MSDA_INLINE Vector load(const Real* from, int i) {
    Vector v;
    __builtin_memcpy(&v, from + i * kLanes, sizeof(Vector));
    return v;
  }
  static MSDA_INLINE void store(Real* to, int i, Vector v) { __builtin_memcpy(to + i * kLanes, &v, sizeof(Vector)); }
};

#if defined(__clang__) || __GNUC__ >= 12
#define MSDA_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#define MSDA_HALVES  // in registers
#else
#define MSDA_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, decltype(a < b){i, j, k, l})
#endif

// Adds the halves of a vector until four lanes are left; vectors of one or two lanes are not changed.
template <int Lanes, typename Vector>
MSDA_LOCAL auto fold(Vector v) {
  if constexpr (Lanes <= 4) {
    return v;
#if defined(MSDA_HALVES)
  } else if constexpr (Lanes == 8) {
    return MSDA_MIX(v, v, 0, 1, 2, 3) + MSDA_MIX(v, v, 4, 5, 6, 7);
  } else if constexpr (Lanes == 16) {
    return fold<8>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#endif
  } else {
    using Real = __typeof__(v[0] + v[0]);
    typename Lane<Real, Lanes / 2>::Vector low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return fold<Lanes / 2>(low + high);
  }
}

// sums[0..3] += the sum of the lanes of each of four vectors.
template <int Lanes, typename Vector, typename Real>
MSDA_LOCAL void add_sums(const Vector (&v)[4], Real* sums) {
  const auto a = fold<Lanes>(v[0]), b = fold<Lanes>(v[1]), c = fold<Lanes>(v[2]), d = fold<Lanes>(v[3]);
  if constexpr (Lanes >= 4) {
    const auto ab = MSDA_MIX(a, b, 0, 4, 1, 5) + MSDA_MIX(a, b, 2, 6, 3, 7);
    const auto cd = MSDA_MIX(c, d, 0, 4, 1, 5) + MSDA_MIX(c, d, 2, 6, 3, 7);
    const auto all = MSDA_MIX(ab, cd, 0, 1, 4, 5) + MSDA_MIX(ab, cd, 2, 3, 6, 7);
    for (int r = 0; r < 4; ++r) sums[r] += all[r];
  } else {
    for (int lane = 0; lane < Lanes; ++lane) {
      sums[0] += a[lane];
      sums[1] += b[lane];
      sums[2] += c[lane];
      sums[3] += d[lane];
    }
  }
}

// output[0:Width] (+)= sum over the batch's points; `value` points to the first channel.
template <int Width, typename Real>
MSDA_LOCAL void gather(const Points<Real>& points, const Real* value, int64_t stride, bool add, Real* output) {
  using R = Row<Real, Width>;
  typename R::Vector sum[R::kVectors];
  for (int v = 0; v < R::kVectors; ++v) sum[v] = add ? R::load(output, v) : typename R::Vector{};
  for (int k = 0; k < points.count; ++k) {
    const int i = points.order[k];
    for (int r = 0; r < 4; ++r) {
      const Real* row = value + points.row[r][i] * stride;
      const Real weight = points.weight[r][i];
      for (int v = 0; v < R::kVectors; ++v) sum[v] += R::load(row, v) * weight;
    }
  }
  for (int v = 0; v < R::kVectors; ++v) R::store(output, v, sum[v]);
}

// The backward: grad_value[pixel] += weight * grad_output and dot += <grad_output, pixel>, each only if wanted. One loop
// does both, so that the products hide stores that miss the cache.
template <int Width, typename Real>
MSDA_LOCAL void scatter(Points<Real>& points, const Real* value, int64_t stride, const Real* grad_output,
                        Real* grad_value, bool dots) {
  using R = Row<Real, Width>;
  typename R::Vector grad[R::kVectors];
  for (int v = 0; v < R::kVectors; ++v) grad[v] = R::load(grad_output, v);
  for (int k = 0; k < points.count; ++k) {
    const int i = points.order[k];
    if (dots) {
      typename R::Vector product[4];
      for (int r = 0; r < 4; ++r) {
        const Real* row = value + points.row[r][i] * stride;
        product[r] = R::load(row, 0) * grad[0];
        for (int v = 1; v < R::kVectors; ++v) product[r] += R::load(row, v) * grad[v];
      }
      add_sums<R::kLanes>(product, points.dot[i]);
    }
    if (grad_value != nullptr) {
      for (int r = 0; r < 4; ++r) {
        Real* row = grad_value + points.row[r][i] * stride;
        const Real weight = points.weight[r][i];
        for (int v = 0; v < R::kVectors; ++v) R::store(row, v, R::load(row, v) + grad[v] * weight);
      }
    }
  }
}

// Splits `channels` into the widest blocks and calls `run(width constant, first channel)` for each.
template <int Width>
struct Constant {
  static constexpr int value = Width;
};
template <int Width = 64, typename Run>
MSDA_LOCAL void blocks(int64_t channels, int64_t first, const Run& run) {
  for (; channels - first >= Width; first += Width) run(Constant<Width>{}, first);
  if constexpr (Width > 1)
    if (first < channels) blocks<Width / 2>(channels, first, run);
}

// The points of a task's rows, computed one row before their use. A wide load of data that was just stored in small
// pieces would wait for all earlier stores, in the backward those to grad_value.
template <typename Real>
class Ahead {
 public:
  MSDA_INLINE Ahead(const Task<Real>& task, Real* scratch, int64_t begin, int64_t end)
      : last(end), placed{{task, scratch}, {task, scratch + scratch_size(task.points) / 2}} {
    if (begin < end) place(task, begin);
  }
  // The points of row `index`; rows are requested in order.
  MSDA_INLINE const Placed<Real>& at(const Task<Real>& task, int64_t index) {
    if (index + 1 < last) place(task, index + 1);
    return placed[index % 2];
  }

 private:
  const int64_t last;
  Placed<Real> placed[2];

  MSDA_INLINE void place(const Task<Real>& task, int64_t index) { placed[index % 2].place(task, Place(task, index)); }
};

template <typename Real>
void forward(const Task<Real>& task, Real* output, Real* scratch, int64_t begin, int64_t end) {
  const int64_t channels = task.channels;
  Ahead<Real> ahead(task, scratch, begin, end);
  Points<Real> points;
  for (int64_t index = begin; index < end; ++index) {
    const Place at(task, index);
    const Placed<Real>& placed = ahead.at(task, index);
    const Real* value = task.value + at.base(task);
    Real* sum = output + at.row * channels;
    if (task.points == 0) __builtin_memset(sum, 0, channels * sizeof(Real));
    for (int64_t first = 0; first < task.points; first += kBatch) {
      const int count = static_cast<int>(task.points - first < kBatch ? task.points - first : kBatch);
      points.resolve(task, placed, first, count);
      blocks(channels, 0, [&](auto width, int64_t channel) __attribute__((always_inline)) {
        gather<decltype(width)::value>(points, value + channel, task.pixel_stride, first > 0, sum + channel);
      });
    }
  }
}

// Not inlined: specialised copies would fuse multiplications and additions differently, and the bits would depend on the
// number of threads.
#if defined(__clang__)
#define MSDA_ONCE static __attribute__((noinline))
#else
#define MSDA_ONCE static __attribute__((noipa))
#endif

// Writes the gradients of points `first_point` to `last_point` of rows `begin` to `end` to `into`. All gradients except
// value's need every point of a row.
template <typename Real>
MSDA_ONCE void sweep(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
                     int64_t begin, int64_t end, int64_t first_point, int64_t last_point) {
  const int64_t channels = task.channels;
  const bool dots = into.places != nullptr || into.weights != nullptr || into.references != nullptr;
  Ahead<Real> ahead(task, scratch, begin, end);
  Points<Real> points;
  for (int64_t index = begin; index < end; ++index) {
    const Place at(task, index);
    const int64_t base = at.base(task);
    const Real* grad = grad_output + at.row * channels;
    prefetch(grad + kAhead * task.heads * channels, channels);
    const Placed<Real>& placed = ahead.at(task, index);
    for (int64_t first = first_point; first < last_point; first += kBatch) {
      const int count = static_cast<int>(last_point - first < kBatch ? last_point - first : kBatch);
      points.resolve(task, placed, first, count);
      points.clear_dots();
      blocks(channels, 0, [&](auto width, int64_t channel) __attribute__((always_inline)) {
        scatter<decltype(width)::value>(points, task.value + base + channel, task.pixel_stride, grad + channel,
                                        into.value == nullptr ? nullptr : into.value + base + channel, dots);
      });
      if (!dots) continue;
      points.differentiate(task, placed);
      placed.chain(task, at, first, first + count, points.x_grad, points.y_grad, into);
    }
    if (into.weights != nullptr) placed.chain_weights(task, at, into);
  }
}

template <typename Real>
MSDA_LOCAL void clear(const Task<Real>& task, Real* pixels, int64_t first, int64_t last) {
  for (int64_t pixel = first; pixel < last; ++pixel)
    __builtin_memset(pixels + pixel * task.pixel_stride, 0, task.channels * sizeof(Real));
}

template <typename Real>
void backward(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
              int64_t begin, int64_t end) {
  for (int64_t pair = begin; pair < end; ++pair) {
    if (into.value != nullptr) clear(task, into.value + pair_base(task, pair), 0, task.pixels);
    sweep(task, grad_output, into, scratch, pair * task.queries, (pair + 1) * task.queries, 0, task.points);
  }
}

template <typename Real>
void backward_rows(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
                   int64_t begin, int64_t end) {
  const Gradients<Real> rest{nullptr, into.places, into.weights, into.references};
  sweep(task, grad_output, rest, scratch, begin, end, 0, task.points);
}

template <typename Real>
void backward_levels(const Task<Real>& task, const Real* grad_output, const Gradients<Real>& into, Real* scratch,
                     int64_t begin, int64_t end) {
  const Gradients<Real> only{into.value, nullptr, nullptr, nullptr};
  const int64_t per_level = task.points / task.levels;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t pair = index / task.levels, first = index % task.levels * per_level;
    const int64_t start = task.start[first], pixels = int64_t{task.width[first]} * task.height[first];
    clear(task, into.value + pair_base(task, pair), start, start + pixels);
    sweep(task, grad_output, only, scratch, pair * task.queries, (pair + 1) * task.queries, first, first + per_level);
  }
}

extern const KernelSet kernels;
const KernelSet kernels = {MSDA_TEXT(MSDA_ISA),
                           {forward<float>, backward<float>, backward_rows<float>, backward_levels<float>},
                           {forward<double>, backward<double>, backward_rows<double>, backward_levels<double>}};

}  // namespace MSDA_ISA
}  // namespace msda

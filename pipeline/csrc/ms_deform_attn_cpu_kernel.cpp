// The CPU kernels of MSDeformAttn, compiled once per instruction set (MSDA_ISA names the copy; build.py has the flags).
//
// Channels are contiguous, so a pixel is a few vectors and no gather is needed: the coordinates of a query's points are
// computed as a batch, then each point is four rows times four numbers, summed in registers.

#include "ms_deform_attn.h"
#include "ms_deform_attn_cpu.h"

#if !defined(MSDA_ISA)
#error "compile with -DMSDA_ISA=name"
#endif
#define MSDA_TEXT_(x) #x
#define MSDA_TEXT(x) MSDA_TEXT_(x)

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
static_assert(kBatch % kStep == 0 && kPointPadding % kStep == 0, "whole steps");

#define MSDA_LOCAL static inline __attribute__((always_inline))

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

// Adds the halves of a vector until four lanes are left (one or two stay as they are).
template <int Lanes, typename Vector>
MSDA_LOCAL auto fold(Vector v) {
  if constexpr (Lanes <= 4) {
    return v;
  } else {
    using Real = __typeof__(v[0] + v[0]);
    typename Lane<Real, Lanes / 2>::Vector low, high;
    __builtin_memcpy(&low, &v, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return fold<Lanes / 2>(low + high);
  }
}

#if defined(__clang__) || __GNUC__ >= 12
#define MSDA_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MSDA_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, decltype(a < b){i, j, k, l})
#endif

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

// Some points of one (image, head, query), coordinates resolved. The four rows of a point: (y low, x low), (low, high),
// (high, low), (high, high). Points off the map are left out of `order`: a branch on them would be hard to predict.
template <typename Real>
class Points {
 public:
  int count;              // in `order`
  int32_t order[kBatch];
  int32_t row[4][kBatch];
  Real weight[4][kBatch];                                  // bilinear times attention
  Real dot[kBatch][4];                                     // <grad_output, row>
  Real x_grad[kBatch], y_grad[kBatch], weight_grad[kBatch];  // of all points, in their own order

  // Points `first` to `first + size` of row `row_index`; whole steps are computed, so a few numbers of the next row
  // (or of a copy, where the tensor ends) may be read in vain.
  MSDA_INLINE void resolve(const Task<Real>& task, int64_t row_index, int64_t first_point, int size) {
    first = first_point;
    steps = (size + kStep - 1) / kStep * kStep;
    const int64_t at = row_index * task.points + first;
    locations = task.locations + 2 * at;
    weights = task.weights + at;
    if (__builtin_expect(at + steps > task.all_points, 0)) {
      __builtin_memset(copy, 0, sizeof(copy));
      __builtin_memcpy(copy, locations, 2 * size * sizeof(Real));
      __builtin_memcpy(copy + 2 * kBatch, weights, size * sizeof(Real));
      locations = copy;
      weights = copy + 2 * kBatch;
    }
    const int32_t* width = task.width + first;
    const int32_t* height = task.height + first;
    const int32_t* start = task.start + first;
    int32_t inside[kBatch];
    for (int step = 0; step < steps; step += kStep) {
#pragma GCC ivdep
      for (int i = step; i < step + kStep; ++i) {
        const Axis<Real> x = axis(locations[2 * i], width[i]);
        const Axis<Real> y = axis(locations[2 * i + 1], height[i]);
        const int32_t low = start[i] + y.low * width[i], high = start[i] + y.high * width[i];
        row[0][i] = low + x.low;
        row[1][i] = low + x.high;
        row[2][i] = high + x.low;
        row[3][i] = high + x.high;
        const Real top = y.weight_low * weights[i], bottom = y.weight_high * weights[i];
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

  // From the dots to the gradients; a point that is not in `order` has dots and gradients of 0.
  MSDA_INLINE void differentiate(const Task<Real>& task) {
    const int32_t* width = task.width + first;
    const int32_t* height = task.height + first;
    for (int step = 0; step < steps; step += kStep) {
#pragma GCC ivdep
      for (int i = step; i < step + kStep; ++i) {
        const PointGradient<Real> gradient =
            point_gradient(axis(locations[2 * i], width[i]), axis(locations[2 * i + 1], height[i]), weights[i],
                           dot[i][0], dot[i][1], dot[i][2], dot[i][3]);
        x_grad[i] = gradient.x;
        y_grad[i] = gradient.y;
        weight_grad[i] = gradient.weight;
      }
    }
  }

 private:
  int64_t first;
  int steps;
  const Real* locations;
  const Real* weights;
  Real copy[3 * kBatch];
};

// output[0:Width] (+)= sum over the batch's points, `value` already at the first channel.
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

// The reverse: grad_value[row] += weight * grad_output and dot += <grad_output, row>, either only if wanted.
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

// Calls `run` with the widest blocks that make up `channels`, as (width constant, first channel).
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

template <typename Real>
void forward(const Task<Real>& task, Real* output, int64_t begin, int64_t end) {
  const int64_t channels = task.channels;
  Points<Real> points;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t pair = index / task.queries, query = index % task.queries;  // pair: (image, head)
    const int64_t image = pair / task.heads, head = pair % task.heads;
    const int64_t row = (image * task.queries + query) * task.heads + head;
    const Real* value = task.value + image * task.image_stride + head * task.head_stride;
    Real* sum = output + row * channels;
    if (task.points == 0) __builtin_memset(sum, 0, channels * sizeof(Real));
    for (int64_t first = 0; first < task.points; first += kBatch) {
      const int count = static_cast<int>(task.points - first < kBatch ? task.points - first : kBatch);
      points.resolve(task, row, first, count);
      blocks(channels, 0, [&](auto width, int64_t channel) __attribute__((always_inline)) {
        gather<decltype(width)::value>(points, value + channel, task.pixel_stride, first > 0, sum + channel);
      });
    }
  }
}

template <typename Real>
void backward(const Task<Real>& task, const Real* grad_output, Real* grad_value, Real* grad_locations,
              Real* grad_weights, int64_t begin, int64_t end) {
  const int64_t channels = task.channels;
  const bool dots = grad_locations != nullptr || grad_weights != nullptr;
  Points<Real> points;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t image = pair / task.heads, head = pair % task.heads;
    const int64_t base = image * task.image_stride + head * task.head_stride;
    const Real* value = task.value + base;
    Real* into = grad_value == nullptr ? nullptr : grad_value + base;
    if (into != nullptr)
      for (int64_t pixel = 0; pixel < task.pixels; ++pixel)
        __builtin_memset(into + pixel * task.pixel_stride, 0, channels * sizeof(Real));
    for (int64_t query = 0; query < task.queries; ++query) {
      const int64_t row = (image * task.queries + query) * task.heads + head;
      for (int64_t first = 0; first < task.points; first += kBatch) {
        const int count = static_cast<int>(task.points - first < kBatch ? task.points - first : kBatch);
        const int64_t at = row * task.points + first;
        points.resolve(task, row, first, count);
        __builtin_memset(points.dot, 0, sizeof(points.dot));
        blocks(channels, 0, [&](auto width, int64_t channel) __attribute__((always_inline)) {
          scatter<decltype(width)::value>(points, value + channel, task.pixel_stride,
                                          grad_output + row * channels + channel,
                                          into == nullptr ? nullptr : into + channel, dots);
        });
        if (!dots) continue;
        points.differentiate(task);
        if (grad_locations != nullptr)
          for (int i = 0; i < count; ++i) {
            grad_locations[2 * (at + i)] = points.x_grad[i];
            grad_locations[2 * (at + i) + 1] = points.y_grad[i];
          }
        if (grad_weights != nullptr)
          for (int i = 0; i < count; ++i) grad_weights[at + i] = points.weight_grad[i];
      }
    }
  }
}

extern const KernelSet kernels;
const KernelSet kernels = {
    MSDA_TEXT(MSDA_ISA), {forward<float>, backward<float>}, {forward<double>, backward<double>}};

}  // namespace MSDA_ISA
}  // namespace msda

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
constexpr int kBatch = 32;  // points whose coordinates are computed together; the usual L * P is 16

#define MSDA_LOCAL static inline __attribute__((always_inline))

// `Width` channels as vectors.
template <typename Real, int Width>
struct Row {
  static constexpr int kBytes = Width * static_cast<int>(sizeof(Real)) < kVectorBytes
                                    ? Width * static_cast<int>(sizeof(Real))
                                    : kVectorBytes;
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(Real));
  static constexpr int kVectors = Width / kLanes;
  typedef Real Vector __attribute__((vector_size(kBytes)));

  static MSDA_INLINE Vector load(const Real* from, int i) {
    Vector v;
    __builtin_memcpy(&v, from + i * kLanes, kBytes);
    return v;
  }
  static MSDA_INLINE void store(Real* to, int i, Vector v) { __builtin_memcpy(to + i * kLanes, &v, kBytes); }
  // Halves are added until one number is left; the order is fixed.
  static MSDA_INLINE Real sum(Vector v) {
    Real lanes[kLanes];
    __builtin_memcpy(lanes, &v, kBytes);
    for (int n = kLanes / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    return lanes[0];
  }
};

// The points of one (image, head, query), coordinates resolved. Row r of a point: (y low, x low), (low, high), (high,
// low), (high, high).
template <typename Real>
struct Points {
  int32_t row[4][kBatch];
  Real weight[4][kBatch];  // bilinear times attention
  Real dot[4][kBatch];     // <grad_output, row>
  int32_t inside[kBatch];
};

template <typename Real>
MSDA_LOCAL void resolve(const Task<Real>& task, const Real* locations, const Real* weights, int64_t first, int count,
                        Points<Real>& points) {
  const int32_t* width = task.width + first;
  const int32_t* height = task.height + first;
  const int32_t* start = task.start + first;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) {
    const Axis<Real> x = axis(locations[2 * i], width[i]);
    const Axis<Real> y = axis(locations[2 * i + 1], height[i]);
    const int32_t low = start[i] + y.low * width[i], high = start[i] + y.high * width[i];
    points.row[0][i] = low + x.low;
    points.row[1][i] = low + x.high;
    points.row[2][i] = high + x.low;
    points.row[3][i] = high + x.high;
    const Real top = y.weight_low * weights[i], bottom = y.weight_high * weights[i];
    points.weight[0][i] = top * x.weight_low;
    points.weight[1][i] = top * x.weight_high;
    points.weight[2][i] = bottom * x.weight_low;
    points.weight[3][i] = bottom * x.weight_high;
    points.inside[i] = x.inside & y.inside;
  }
}

// output[0:Width] (+)= sum over the batch's points, `value` already at the first channel.
template <int Width, typename Real>
MSDA_LOCAL void gather(const Points<Real>& points, int count, const Real* value, int64_t stride, bool add,
                       Real* output) {
  using R = Row<Real, Width>;
  typename R::Vector sum[R::kVectors];
  for (int v = 0; v < R::kVectors; ++v) sum[v] = add ? R::load(output, v) : typename R::Vector{};
  for (int i = 0; i < count; ++i) {
    if (!points.inside[i]) continue;
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
MSDA_LOCAL void scatter(Points<Real>& points, int count, const Real* value, int64_t stride, const Real* grad_output,
                        Real* grad_value, bool dots) {
  using R = Row<Real, Width>;
  typename R::Vector grad[R::kVectors];
  for (int v = 0; v < R::kVectors; ++v) grad[v] = R::load(grad_output, v);
  for (int i = 0; i < count; ++i) {
    if (!points.inside[i]) continue;
    for (int r = 0; r < 4; ++r) {
      const int64_t offset = points.row[r][i] * stride;
      if (dots) {
        typename R::Vector product = R::load(value + offset, 0) * grad[0];
        for (int v = 1; v < R::kVectors; ++v) product += R::load(value + offset, v) * grad[v];
        points.dot[r][i] += R::sum(product);
      }
      if (grad_value != nullptr) {
        const Real weight = points.weight[r][i];
        for (int v = 0; v < R::kVectors; ++v)
          R::store(grad_value + offset, v, R::load(grad_value + offset, v) + grad[v] * weight);
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
    const Real* value = task.value + pair * task.pixels * channels;
    Real* sum = output + row * channels;
    if (task.points == 0) __builtin_memset(sum, 0, channels * sizeof(Real));
    for (int64_t first = 0; first < task.points; first += kBatch) {
      const int count = static_cast<int>(task.points - first < kBatch ? task.points - first : kBatch);
      const int64_t at = row * task.points + first;
      resolve(task, task.locations + 2 * at, task.weights + at, first, count, points);
      blocks(channels, 0, [&](auto width, int64_t channel) __attribute__((always_inline)) {
        gather<decltype(width)::value>(points, count, value + channel, channels, first > 0, sum + channel);
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
    const Real* value = task.value + pair * task.pixels * channels;
    Real* into = grad_value == nullptr ? nullptr : grad_value + pair * task.pixels * channels;
    if (into != nullptr) __builtin_memset(into, 0, task.pixels * channels * sizeof(Real));
    for (int64_t query = 0; query < task.queries; ++query) {
      const int64_t row = (image * task.queries + query) * task.heads + head;
      for (int64_t first = 0; first < task.points; first += kBatch) {
        const int count = static_cast<int>(task.points - first < kBatch ? task.points - first : kBatch);
        const int64_t at = row * task.points + first;
        const Real* locations = task.locations + 2 * at;
        const Real* weights = task.weights + at;
        resolve(task, locations, weights, first, count, points);
        __builtin_memset(points.dot, 0, sizeof(points.dot));
        blocks(channels, 0, [&](auto width, int64_t channel) __attribute__((always_inline)) {
          scatter<decltype(width)::value>(points, count, value + channel, channels,
                                          grad_output + row * channels + channel,
                                          into == nullptr ? nullptr : into + channel, dots);
        });
        if (!dots) continue;
        Real x_gradient[kBatch], y_gradient[kBatch], weight_gradient[kBatch];
        for (int i = 0; i < count; ++i) {
          const PointGradient<Real> gradient =
              point_gradient(axis(locations[2 * i], task.width[first + i]),
                             axis(locations[2 * i + 1], task.height[first + i]), weights[i], points.dot[0][i],
                             points.dot[1][i], points.dot[2][i], points.dot[3][i]);
          x_gradient[i] = gradient.x;
          y_gradient[i] = gradient.y;
          weight_gradient[i] = gradient.weight;
        }
        if (grad_locations != nullptr)
          for (int i = 0; i < count; ++i) {
            grad_locations[2 * (at + i)] = x_gradient[i];
            grad_locations[2 * (at + i) + 1] = y_gradient[i];
          }
        if (grad_weights != nullptr)
          for (int i = 0; i < count; ++i) grad_weights[at + i] = weight_gradient[i];
      }
    }
  }
}

extern const KernelSet kernels;
const KernelSet kernels = {
    MSDA_TEXT(MSDA_ISA), {forward<float>, backward<float>}, {forward<double>, backward<double>}};

}  // namespace MSDA_ISA
}  // namespace msda

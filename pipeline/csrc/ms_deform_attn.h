// The arithmetic shared by all kernels of MSDeformAttn: from a location to the four pixels around it, and from the four
// products <grad_output, pixel> back to the gradients of a point. These are plain functions over numbers for host and
// device, so the CPU tests also verify the arithmetic of the CUDA kernels.

#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define MSDA_INLINE __host__ __device__ __forceinline__
#else
#define MSDA_INLINE inline __attribute__((always_inline))
#endif

namespace msda {

// One axis of one sampling point. Pixel p = location * size - 0.5 lies between the pixels low and high.
template <typename Real>
struct Axis {
  int32_t low, high;              // clamped to the map, so that both may be read
  Real weight_low, weight_high;   // bilinear weights; 0 for a pixel off the map
  Real slope_low, slope_high;     // derivatives of the weights, see below
  int32_t inside;                 // -1 < p < size; 0 for NaN and infinite locations, whose weights are all 0
};

// The axis around a pixel coordinate; the slopes are derivatives with respect to it. Branch-free, so that a loop over
// points is vectorised: conditions are factors of 0 and 1, and floor is truncation plus a correction, because the
// baseline instruction set has no rounding instruction.
template <typename Real>
MSDA_INLINE Axis<Real> axis_at(Real pixel, int32_t size) {
  const int32_t inside =
      static_cast<int32_t>(pixel > Real(-1)) & static_cast<int32_t>(pixel < static_cast<Real>(size));
  const Real safe = inside != 0 ? pixel : Real(0);
  int32_t low = static_cast<int32_t>(safe);
  low -= static_cast<int32_t>(safe < static_cast<Real>(low));
  const Real fraction = safe - static_cast<Real>(low);
  const Real has_low = static_cast<Real>(inside & static_cast<int32_t>(low >= 0));
  const Real has_high = static_cast<Real>(inside & static_cast<int32_t>(low + 1 < size));
  Axis<Real> a;
  a.low = low > 0 ? low : 0;
  a.high = low + 1 < size - 1 ? low + 1 : size - 1;
  a.weight_low = has_low * (Real(1) - fraction);
  a.weight_high = has_high * fraction;
  a.slope_low = -has_low;
  a.slope_high = has_high;
  a.inside = inside;
  return a;
}

// The axis around a location in [0, 1]; the slopes are derivatives with respect to the location.
template <typename Real>
MSDA_INLINE Axis<Real> axis(Real location, int32_t size) {
  const Real extent = static_cast<Real>(size);
  Axis<Real> a = axis_at(location * extent - Real(0.5), size);
  a.slope_low *= extent;
  a.slope_high *= extent;
  return a;
}

// Pixel coordinates of the fused operator's points on one axis of one level: pixel = base + scale * offset. A reference
// point shifts its points: d pixel / d reference = size. A reference box also scales them: d pixel / d side =
// offset * spread.
template <typename Real>
struct Placement {
  Real base, scale, spread;
};

// Around a reference point, offsets in pixels: (reference + offset / size) * size - 0.5, without the division.
template <typename Real>
MSDA_INLINE Placement<Real> around_point(Real reference, int32_t size) {
  return {reference * static_cast<Real>(size) - Real(0.5), Real(1), Real(0)};
}

// Around a reference box, offsets in half sides over the number of points.
template <typename Real>
MSDA_INLINE Placement<Real> around_box(Real centre, Real side, int32_t size, int64_t points) {
  const Real spread = static_cast<Real>(size) * (Real(0.5) / static_cast<Real>(points));
  return {centre * static_cast<Real>(size) - Real(0.5), side * spread, spread};
}

// Gradients of one point.
template <typename Real>
struct PointGradient {
  Real x, y, weight;
};

// `dot_*` is <grad_output, pixel> of the four pixels (row: y low or high, column: x low or high); the three gradients
// are linear in them. x and y are gradients of the coordinate that the slopes of the axes refer to.
template <typename Real>
MSDA_INLINE PointGradient<Real> point_gradient(const Axis<Real>& x, const Axis<Real>& y, Real attention, Real dot_ll,
                                               Real dot_lh, Real dot_hl, Real dot_hh) {
  const Real row_low = x.weight_low * dot_ll + x.weight_high * dot_lh;
  const Real row_high = x.weight_low * dot_hl + x.weight_high * dot_hh;
  const Real column_low = y.weight_low * dot_ll + y.weight_high * dot_hl;
  const Real column_high = y.weight_low * dot_lh + y.weight_high * dot_hh;
  return {attention * (x.slope_low * column_low + x.slope_high * column_high),
          attention * (y.slope_low * row_low + y.slope_high * row_high),
          y.weight_low * row_low + y.weight_high * row_high};
}

}  // namespace msda

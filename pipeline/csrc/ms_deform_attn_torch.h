// Shared by the CPU and CUDA entry points: sizes, and the checks that keep kernels from reading out of bounds. sampling.py
// checks first, with better messages; these checks protect direct calls of torch.ops.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <vector>

namespace msda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Sizes {
  int64_t batch, pixels, heads, channels, queries, levels, points;  // points: per level
};

inline ScalarType accumulate_type(ScalarType value) {
  return value == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Everything except the types. `shapes` is H0, W0, H1, W1, ...
inline Sizes check_sizes(const Tensor& value, const Tensor& locations, const Tensor& weights,
                         const std::vector<int64_t>& shapes) {
  STD_TORCH_CHECK(value.dim() == 4 && locations.dim() == 6 && weights.dim() == 5,
                  "ms_deform_attn: value must be [N, S, M, D], locations [N, Q, M, L, P, 2], weights [N, Q, M, L, P]");
  const Sizes s{value.size(0),     value.size(1),     value.size(2),    value.size(3),
                locations.size(1), locations.size(3), locations.size(4)};
  STD_TORCH_CHECK(locations.size(0) == s.batch && locations.size(2) == s.heads && locations.size(5) == 2,
                  "ms_deform_attn: locations do not fit value");
  for (int64_t i = 0; i < 5; ++i)
    STD_TORCH_CHECK(weights.size(i) == locations.size(i), "ms_deform_attn: weights do not fit locations");
  STD_TORCH_CHECK(static_cast<int64_t>(shapes.size()) == 2 * s.levels, "ms_deform_attn: shapes must hold H, W of ",
                  s.levels, " levels");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  int64_t pixels = 0;
  for (int64_t level = 0; level < s.levels; ++level) {
    const int64_t height = shapes[2 * level], width = shapes[2 * level + 1];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= limit && width <= limit && height * width <= limit - pixels,
                    "ms_deform_attn: level ", level, " is ", height, " x ", width);
    pixels += height * width;
  }
  STD_TORCH_CHECK(pixels == s.pixels, "ms_deform_attn: the levels hold ", pixels, " pixels, value ", s.pixels);
  STD_TORCH_CHECK(locations.device() == value.device() && weights.device() == value.device(),
                  "ms_deform_attn: tensors on different devices");
  return s;
}

inline Sizes check(const Tensor& value, const Tensor& locations, const Tensor& weights,
                   const std::vector<int64_t>& shapes) {
  const Sizes s = check_sizes(value, locations, weights, shapes);
  const ScalarType wanted = accumulate_type(value.scalar_type());
  STD_TORCH_CHECK(locations.scalar_type() == wanted && weights.scalar_type() == wanted,
                  "ms_deform_attn: locations and weights must be float32 (float64 for a float64 value)");
  return s;
}

// The fused operator: offsets instead of locations and logits instead of weights, both of the same type.
inline Sizes check_fused(const Tensor& value, const Tensor& references, const Tensor& offsets, const Tensor& logits,
                         const std::vector<int64_t>& shapes) {
  const Sizes s = check_sizes(value, offsets, logits, shapes);
  STD_TORCH_CHECK(references.dim() == 4 && references.size(0) == s.batch && references.size(1) == s.queries &&
                      references.size(2) == s.levels && (references.size(3) == 2 || references.size(3) == 4) &&
                      references.device() == value.device(),
                  "ms_deform_attn_fused: references must be [N, Q, L, 2 or 4] on value's device");
  const ScalarType wanted = accumulate_type(value.scalar_type());
  STD_TORCH_CHECK(references.scalar_type() == wanted,
                  "ms_deform_attn_fused: references must be float32 (float64 for a float64 value)");
  STD_TORCH_CHECK(offsets.scalar_type() == logits.scalar_type() &&
                      (offsets.scalar_type() == wanted || offsets.scalar_type() == value.scalar_type()),
                  "ms_deform_attn_fused: offsets and logits must be both of value's type, or both float32");
  return s;
}

inline void check_grad_output(const Tensor& grad_output, const Tensor& value, const Sizes& s) {
  STD_TORCH_CHECK(grad_output.dim() == 3 && grad_output.size(0) == s.batch && grad_output.size(1) == s.queries &&
                      grad_output.size(2) == s.heads * s.channels && grad_output.device() == value.device(),
                  "ms_deform_attn: grad_output must be [N, Q, M * D] on value's device");
}

// Dense and of `type`; copied only if needed.
inline Tensor dense(const Tensor& tensor, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(tensor, type));
}

// The result for a gradient that was not requested.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

}  // namespace msda

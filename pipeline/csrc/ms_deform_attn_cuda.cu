// The CUDA side of MSDeformAttn as torch sees it: checks, layout, device, stream, launches. The kernels are in the .cuh.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "ms_deform_attn.cuh"
#include "ms_deform_attn_torch.h"

namespace msda {
namespace {

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Geometry geometry(const Sizes& s, const std::vector<int64_t>& shapes) {
  STD_TORCH_CHECK(s.levels <= kMaxLevels, "ms_deform_attn: the CUDA kernels take up to ", kMaxLevels, " levels, not ",
                  s.levels);
  STD_TORCH_CHECK(s.points <= std::numeric_limits<int32_t>::max(), "ms_deform_attn: too many points");
  Geometry g{s.batch, s.pixels, s.heads, s.channels, s.queries, static_cast<int32_t>(s.levels),
             static_cast<int32_t>(s.points), {}, {}, {}};
  int64_t start = 0;
  for (int64_t level = 0; level < s.levels; ++level) {
    g.height[level] = static_cast<int32_t>(shapes[2 * level]);
    g.width[level] = static_cast<int32_t>(shapes[2 * level + 1]);
    g.start[level] = static_cast<int32_t>(start);
    start += shapes[2 * level] * shapes[2 * level + 1];
  }
  return g;
}

// Calls `run` with null pointers of the value's and the accumulation type.
template <typename Run>
void dispatch(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Double:
      return run(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case ScalarType::Float:
      return run(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case ScalarType::Half:
      return run(static_cast<__half*>(nullptr), static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return run(static_cast<__nv_bfloat16*>(nullptr), static_cast<float*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "ms_deform_attn: value must be float64, float32, float16 or bfloat16");
  }
}

Tensor forward_cuda(const Tensor& value, const Tensor& locations, const Tensor& weights, std::vector<int64_t> shapes) {
  const Sizes s = check(value, locations, weights, shapes);
  const Geometry g = geometry(s, shapes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.channels});
  if (output.numel() == 0) return output;
  const Tensor dense_value = torch::stable::contiguous(value), dense_locations = torch::stable::contiguous(locations),
               dense_weights = torch::stable::contiguous(weights);
  dispatch(value.scalar_type(), [&](auto* value_type, auto* real_type) {
    using Value = std::remove_pointer_t<decltype(value_type)>;
    using Real = std::remove_pointer_t<decltype(real_type)>;
    forward_kernel<Value, Real><<<grid_size(g), kBlock, 0, current_stream(value)>>>(
        g, static_cast<const Value*>(dense_value.const_data_ptr()),
        static_cast<const Real*>(dense_locations.const_data_ptr()),
        static_cast<const Real*>(dense_weights.const_data_ptr()), static_cast<Value*>(output.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& value,
                                                 const Tensor& locations, const Tensor& weights,
                                                 std::vector<int64_t> shapes, std::vector<bool> wanted) {
  using torch::stable::new_empty;
  const Sizes s = check(value, locations, weights, shapes);
  check_grad_output(grad_output, value, s);
  STD_TORCH_CHECK(wanted.size() == 3, "ms_deform_attn: wanted must hold 3 booleans");
  const Geometry g = geometry(s, shapes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const ScalarType type = accumulate_type(value.scalar_type());
  const Tensor grad_value = wanted[0] ? torch::stable::new_zeros(value, value.sizes(), type) : nothing(value);
  const Tensor grad_locations = wanted[1] ? new_empty(locations, locations.sizes()) : nothing(locations);
  const Tensor grad_weights = wanted[2] ? new_empty(weights, weights.sizes()) : nothing(weights);
  if (weights.numel() > 0) {
    const Tensor dense_grad = dense(grad_output, value.scalar_type()), dense_value = torch::stable::contiguous(value),
                 dense_locations = torch::stable::contiguous(locations),
                 dense_weights = torch::stable::contiguous(weights);
    dispatch(value.scalar_type(), [&](auto* value_type, auto* real_type) {
      using Value = std::remove_pointer_t<decltype(value_type)>;
      using Real = std::remove_pointer_t<decltype(real_type)>;
      backward_kernel<Value, Real><<<grid_size(g), kBlock, 0, current_stream(value)>>>(
          g, static_cast<const Value*>(dense_grad.const_data_ptr()),
          static_cast<const Value*>(dense_value.const_data_ptr()),
          static_cast<const Real*>(dense_locations.const_data_ptr()),
          static_cast<const Real*>(dense_weights.const_data_ptr()),
          wanted[0] ? static_cast<Real*>(grad_value.mutable_data_ptr()) : nullptr,
          wanted[1] ? static_cast<Real*>(grad_locations.mutable_data_ptr()) : nullptr,
          wanted[2] ? static_cast<Real*>(grad_weights.mutable_data_ptr()) : nullptr);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {wanted[0] ? torch::stable::to(grad_value, value.scalar_type()) : grad_value, grad_locations, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deformable_detr, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cuda));
}

}  // namespace msda

// The CUDA entry points of MSDeformAttn for torch: checks, layout, device, stream. ms_deform_attn_launch.cuh selects
// kernels.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#include <atomic>
#include <tuple>

#include "ms_deform_attn_launch.cuh"
#include "ms_deform_attn_torch.h"

namespace msda {
namespace {

std::atomic<uint32_t> chosen{0};  // see msda_cuda_kernels

// For the current device.
Kernels kernels() {
  Kernels found{chosen, 0};
  int device = 0;
  if (found.has(Kernels::kNeighbours) && cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
  return found;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
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

// A tensor's data pointer; null for a gradient that is not wanted.
template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* result(const Tensor& tensor, bool wanted = true) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

Tensor zeros(const Tensor& like, ScalarType type, bool wanted) {
  return wanted ? torch::stable::new_zeros(like, like.sizes(), type) : nothing(like);
}
Tensor uninitialised(const Tensor& like, bool wanted) {
  return wanted ? torch::stable::new_empty(like, like.sizes()) : nothing(like);
}

Tensor forward_cuda(const Tensor& value, const Tensor& locations, const Tensor& weights, std::vector<int64_t> shapes) {
  using torch::stable::contiguous;
  const Sizes s = check(value, locations, weights, shapes);
  const Geometry g = geometry(s, shapes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.channels});
  if (output.numel() == 0) return output;
  const Tensor dense_value = contiguous(value), dense_locations = contiguous(locations),
               dense_weights = contiguous(weights);
  dispatch(value.scalar_type(), [&](auto* value_type, auto* real_type) {
    using Value = std::remove_pointer_t<decltype(value_type)>;
    using Real = std::remove_pointer_t<decltype(real_type)>;
    forward(g, kernels(), input<Value>(dense_value), input<Real>(dense_locations), input<Real>(dense_weights),
            result<Value>(output), current_stream(value));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

// kOrdered: the sums in grad_value have a fixed order.
template <bool kOrdered>
std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& value,
                                                 const Tensor& locations, const Tensor& weights,
                                                 std::vector<int64_t> shapes, std::vector<bool> wanted) {
  using torch::stable::contiguous;
  const Sizes s = check(value, locations, weights, shapes);
  check_grad_output(grad_output, value, s);
  STD_TORCH_CHECK(wanted.size() == 3, "ms_deform_attn: wanted must hold 3 booleans");
  const Geometry g = geometry(s, shapes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor grad_value = zeros(value, accumulate_type(value.scalar_type()), wanted[0]);
  const Tensor grad_locations = uninitialised(locations, wanted[1]), grad_weights = uninitialised(weights, wanted[2]);
  if (weights.numel() > 0) {
    const Tensor dense_grad = dense(grad_output, value.scalar_type()), dense_value = contiguous(value),
                 dense_locations = contiguous(locations), dense_weights = contiguous(weights);
    dispatch(value.scalar_type(), [&](auto* value_type, auto* real_type) {
      using Value = std::remove_pointer_t<decltype(value_type)>;
      using Real = std::remove_pointer_t<decltype(real_type)>;
      const auto run = kOrdered ? backward_ordered<Value, Real> : backward<Value, Real>;
      run(g, kernels(), input<Value>(dense_grad), input<Value>(dense_value), input<Real>(dense_locations),
          input<Real>(dense_weights), result<Real>(grad_value, wanted[0]), result<Real>(grad_locations, wanted[1]),
          result<Real>(grad_weights, wanted[2]), current_stream(value));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
  return {wanted[0] ? torch::stable::to(grad_value, value.scalar_type()) : grad_value, grad_locations, grad_weights};
}

// Intermediate locations and weights of the fused operator, for sizes that the fast kernels do not support.
std::tuple<Tensor, Tensor> expanded(const Geometry& g, const Tensor& references, const Tensor& offsets,
                                    const Tensor& logits) {
  const Tensor locations = torch::stable::new_empty(references, offsets.sizes());
  const Tensor weights = torch::stable::new_empty(references, logits.sizes());
  dispatch(offsets.scalar_type(), [&](auto* offset_type, auto* real_type) {
    using Offset = std::remove_pointer_t<decltype(offset_type)>;
    using Real = std::remove_pointer_t<decltype(real_type)>;
    expand(g, static_cast<int32_t>(references.size(3)), input<Real>(references), input<Offset>(offsets),
           input<Offset>(logits), result<Real>(locations), result<Real>(weights), current_stream(offsets));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {locations, weights};
}

template <typename Value>
FusedInputs<Value> fused_inputs(const Tensor& references, const Tensor& offsets, const Tensor& logits) {
  return {input<float>(references), static_cast<int32_t>(references.size(3)), input<Value>(offsets),
          input<Value>(logits)};
}

Tensor forward_fused_cuda(const Tensor& value, const Tensor& references, const Tensor& offsets, const Tensor& logits,
                          std::vector<int64_t> shapes) {
  using torch::stable::contiguous;
  const Sizes s = check_fused(value, references, offsets, logits, shapes);
  const Geometry g = geometry(s, shapes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.channels});
  if (output.numel() == 0) return output;
  if (logits.numel() == 0) return torch::stable::zero_(const_cast<Tensor&>(output));
  const Tensor dense_value = contiguous(value), dense_references = contiguous(references),
               dense_offsets = contiguous(offsets), dense_logits = contiguous(logits);
  bool done = false;
  if (offsets.scalar_type() == value.scalar_type()) {
    dispatch(value.scalar_type(), [&](auto* value_type, auto* real_type) {
      using Value = std::remove_pointer_t<decltype(value_type)>;
      if constexpr (sizeof(Value) <= 4) {
        done = forward_fused(g, kernels(), input<Value>(dense_value),
                             fused_inputs<Value>(dense_references, dense_offsets, dense_logits), result<Value>(output),
                             current_stream(value));
        if (done) STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  }
  if (done) return output;
  const auto [locations, weights] = expanded(g, dense_references, dense_offsets, dense_logits);
  return forward_cuda(dense_value, locations, weights, shapes);
}

template <bool kOrdered>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_fused_cuda(const Tensor& grad_output, const Tensor& value,
                                                               const Tensor& references, const Tensor& offsets,
                                                               const Tensor& logits, std::vector<int64_t> shapes,
                                                               std::vector<bool> wanted) {
  using torch::stable::contiguous;
  const Sizes s = check_fused(value, references, offsets, logits, shapes);
  check_grad_output(grad_output, value, s);
  STD_TORCH_CHECK(wanted.size() == 4, "ms_deform_attn_fused: wanted must hold 4 booleans");
  const Geometry g = geometry(s, shapes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  Tensor grad_value = zeros(value, accumulate_type(value.scalar_type()), wanted[0]);
  const Tensor grad_references = zeros(references, references.scalar_type(), wanted[1]);
  const Tensor grad_offsets = uninitialised(offsets, wanted[2]), grad_logits = uninitialised(logits, wanted[3]);
  if (logits.numel() > 0) {
    const Tensor dense_grad = dense(grad_output, value.scalar_type()), dense_value = contiguous(value),
                 dense_references = contiguous(references), dense_offsets = contiguous(offsets),
                 dense_logits = contiguous(logits);
    bool done = false;
    if (!kOrdered && offsets.scalar_type() == value.scalar_type()) {
      dispatch(value.scalar_type(), [&](auto* value_type, auto* real_type) {
        using Value = std::remove_pointer_t<decltype(value_type)>;
        if constexpr (sizeof(Value) <= 4) {
          done = backward_fused(g, kernels(), input<Value>(dense_grad), input<Value>(dense_value),
                                fused_inputs<Value>(dense_references, dense_offsets, dense_logits),
                                result<float>(grad_value, wanted[0]), result<float>(grad_references, wanted[1]),
                                result<Value>(grad_offsets, wanted[2]), result<Value>(grad_logits, wanted[3]),
                                current_stream(value));
          if (done) STD_CUDA_KERNEL_LAUNCH_CHECK();
        }
      });
    }
    if (!done) {
      const auto [locations, weights] = expanded(g, dense_references, dense_offsets, dense_logits);
      const bool places = wanted[1] || wanted[2];
      const auto [plain_value, grad_locations, grad_weights] =
          backward_cuda<kOrdered>(dense_grad, dense_value, locations, weights, shapes, {wanted[0], places, wanted[3]});
      dispatch(offsets.scalar_type(), [&](auto* offset_type, auto* real_type) {
        using Offset = std::remove_pointer_t<decltype(offset_type)>;
        using Real = std::remove_pointer_t<decltype(real_type)>;
        fold(g, static_cast<int32_t>(references.size(3)), input<Real>(dense_references), input<Offset>(dense_offsets),
             input<Real>(weights), input<Real>(grad_locations), input<Real>(grad_weights),
             result<Real>(grad_references, wanted[1]), result<Offset>(grad_offsets, wanted[2]),
             result<Offset>(grad_logits, wanted[3]), current_stream(value));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
      grad_value = plain_value;
    }
  }
  return {wanted[0] ? torch::stable::to(grad_value, value.scalar_type()) : grad_value, grad_references, grad_offsets,
          grad_logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deformable_detr, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cuda<false>));
  m.impl("ms_deform_attn_backward_ordered", TORCH_BOX(&backward_cuda<true>));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&forward_fused_cuda));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&backward_fused_cuda<false>));
  m.impl("ms_deform_attn_fused_backward_ordered", TORCH_BOX(&backward_fused_cuda<true>));
}

}  // namespace msda

// Sets which kernels run in this process, as a sum of Kernels::Bit, and returns the setting; below 0 it only returns it.
extern "C" __attribute__((visibility("default"))) int64_t msda_cuda_kernels(int64_t wanted) {
  if (wanted >= 0) msda::chosen = static_cast<uint32_t>(wanted);
  return msda::chosen;
}

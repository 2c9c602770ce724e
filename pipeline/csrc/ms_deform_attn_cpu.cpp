// The CPU side of MSDeformAttn as torch sees it: checks, layout, threads, choice of the instruction set.

#include "ms_deform_attn_cpu.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <string>
#include <tuple>
#include <utility>

#include "ms_deform_attn_torch.h"

namespace msda {

namespace baseline {
extern const KernelSet kernels;
}
#if defined(MSDA_X86)
namespace avx2 {
extern const KernelSet kernels;
}
namespace avx512 {
extern const KernelSet kernels;
}
#endif

namespace {

// The best kernels that this processor can run, or those of `wanted` if it can run them.
const KernelSet* choose(const char* wanted) {
  const auto allowed = [wanted](const KernelSet& set) { return wanted == nullptr || std::string(set.name) == wanted; };
#if defined(MSDA_X86)
  const bool fma = __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && allowed(avx512::kernels))
    return &avx512::kernels;
  if (fma && __builtin_cpu_supports("avx2") && allowed(avx2::kernels)) return &avx2::kernels;
#endif
  return allowed(baseline::kernels) ? &baseline::kernels : nullptr;
}

std::atomic<const KernelSet*>& chosen() {
  static std::atomic<const KernelSet*> set{choose(nullptr)};
  return set;
}

template <typename Real>
const Kernels<Real>& kernels() {
  const KernelSet& set = *chosen();
  if constexpr (sizeof(Real) == sizeof(double))
    return set.twice;
  else
    return set.single;
}

// Where pixels are read often (in an encoder), value is first copied to [N, M, S, D], so that one head's maps are dense
// and stay in cache; where they are not (in a decoder), the copy would cost more than the sampling.
bool head_major(const Sizes& s) { return s.queries * s.levels * s.points > 2 * s.pixels; }

Tensor in_layout(const Tensor& value, const Sizes& s, ScalarType type) {
  return dense(head_major(s) ? torch::stable::transpose(value, 1, 2) : value, type);
}

// The inputs in the kernels' layout, alive as long as the task that points into them.
template <typename Real>
class Input {
 public:
  Input(const Tensor& value, const Tensor& locations, const Tensor& weights, const std::vector<int64_t>& shapes,
        const Sizes& s, ScalarType type)
      : value_(in_layout(value, s, type)),
        locations_(dense(locations, type)),
        weights_(dense(weights, type)) {
    int64_t start = 0;
    for (int64_t level = 0; level < s.levels; ++level) {
      width_.insert(width_.end(), s.points, static_cast<int32_t>(shapes[2 * level + 1]));
      height_.insert(height_.end(), s.points, static_cast<int32_t>(shapes[2 * level]));
      start_.insert(start_.end(), s.points, static_cast<int32_t>(start));
      start += shapes[2 * level] * shapes[2 * level + 1];
    }
    width_.resize(width_.size() + kPointPadding, 1);
    height_.resize(height_.size() + kPointPadding, 1);
    start_.resize(start_.size() + kPointPadding, 0);
    task_ = {s.pixels,
             s.heads,
             s.channels,
             s.queries,
             s.levels * s.points,
             locations.numel() / 2,
             width_.data(),
             height_.data(),
             start_.data(),
             value_.const_data_ptr<Real>(),
             s.pixels * s.heads * s.channels,
             head_major(s) ? s.pixels * s.channels : s.channels,
             head_major(s) ? s.channels : s.heads * s.channels,
             locations_.const_data_ptr<Real>(),
             weights_.const_data_ptr<Real>()};
  }
  Input(const Input&) = delete;
  const Task<Real>& task() const { return task_; }

 private:
  Tensor value_, locations_, weights_;
  std::vector<int32_t> width_, height_, start_;
  Task<Real> task_;
};

template <typename Real>
Tensor forward(const Tensor& value, const Tensor& locations, const Tensor& weights, const std::vector<int64_t>& shapes,
               const Sizes& s) {
  const ScalarType type = accumulate_type(value.scalar_type());
  const Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.channels}, type);
  if (output.numel() > 0) {
    const Input<Real> input(value, locations, weights, shapes, s, type);
    Real* into = output.mutable_data_ptr<Real>();
    constexpr int64_t grain = 128;  // queries per thread at least: some 10 us
    torch::stable::parallel_for(0, s.batch * s.heads * s.queries, grain, [&](int64_t begin, int64_t end) {
      kernels<Real>().forward(input.task(), into, begin, end);
    });
  }
  return torch::stable::to(output, value.scalar_type());
}

Tensor forward_cpu(const Tensor& value, const Tensor& locations, const Tensor& weights, std::vector<int64_t> shapes) {
  const Sizes s = check(value, locations, weights, shapes);
  if (value.scalar_type() == ScalarType::Double) return forward<double>(value, locations, weights, shapes, s);
  return forward<float>(value, locations, weights, shapes, s);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename Real>
Gradients backward(const Tensor& grad_output, const Tensor& value, const Tensor& locations, const Tensor& weights,
                   const std::vector<int64_t>& shapes, const std::vector<bool>& wanted, const Sizes& s) {
  using torch::stable::new_empty;
  const ScalarType type = accumulate_type(value.scalar_type());
  std::vector<int64_t> layout = {s.batch, s.pixels, s.heads, s.channels};
  if (head_major(s)) std::swap(layout[1], layout[2]);
  const Tensor grad_value = wanted[0] ? new_empty(value, layout, type) : nothing(value);
  const Tensor grad_locations = wanted[1] ? new_empty(locations, locations.sizes()) : nothing(locations);
  const Tensor grad_weights = wanted[2] ? new_empty(weights, weights.sizes()) : nothing(weights);
  if (s.batch * s.heads > 0) {
    const Tensor dense_grad = dense(grad_output, type);
    const Input<Real> input(value, locations, weights, shapes, s, type);
    const Real* grad = dense_grad.const_data_ptr<Real>();
    Real* into_value = wanted[0] ? grad_value.mutable_data_ptr<Real>() : nullptr;
    Real* into_locations = wanted[1] ? grad_locations.mutable_data_ptr<Real>() : nullptr;
    Real* into_weights = wanted[2] ? grad_weights.mutable_data_ptr<Real>() : nullptr;
    torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
      kernels<Real>().backward(input.task(), grad, into_value, into_locations, into_weights, begin, end);
    });
  }
  if (!wanted[0]) return {grad_value, grad_locations, grad_weights};
  const Tensor as_value = head_major(s) ? torch::stable::transpose(grad_value, 1, 2) : grad_value;
  return {dense(as_value, value.scalar_type()), grad_locations, grad_weights};
}

Gradients backward_cpu(const Tensor& grad_output, const Tensor& value, const Tensor& locations, const Tensor& weights,
                       std::vector<int64_t> shapes, std::vector<bool> wanted) {
  const Sizes s = check(value, locations, weights, shapes);
  check_grad_output(grad_output, value, s);
  STD_TORCH_CHECK(wanted.size() == 3, "ms_deform_attn: wanted must hold 3 booleans");
  if (value.scalar_type() == ScalarType::Double)
    return backward<double>(grad_output, value, locations, weights, shapes, wanted, s);
  return backward<float>(grad_output, value, locations, weights, shapes, wanted, s);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deformable_detr, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace msda

// For build.py, through ctypes: set the instruction set if `wanted` is not null and this processor has it; what it is.
extern "C" __attribute__((visibility("default"))) const char* msda_instruction_set(const char* wanted) {
  if (wanted != nullptr)
    if (const msda::KernelSet* set = msda::choose(wanted)) msda::chosen() = set;
  return msda::chosen().load()->name;
}

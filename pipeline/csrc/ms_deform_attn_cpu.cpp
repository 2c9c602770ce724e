// The CPU entry points of MSDeformAttn for torch: checks, layout, threads, choice of the instruction set.

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

// If pixels are read often (encoder), value is first copied to [N, M, S, D]: one head's maps are then dense and stay in
// cache. If they are not (decoder), the copy would cost more than the sampling.
bool head_major(const Sizes& s) { return s.queries * s.levels * s.points > 2 * s.pixels; }

Tensor in_layout(const Tensor& value, const Sizes& s, ScalarType type) {
  return dense(head_major(s) ? torch::stable::transpose(value, 1, 2) : value, type);
}

// The inputs in the kernels' layout; they must outlive the task that points into them. `references` is null for the
// plain operator. For the fused operator places are offsets and weights are logits.
template <typename Real>
class Input {
 public:
  Input(const Tensor& value, const Tensor* references, const Tensor& places, const Tensor& weights,
        const std::vector<int64_t>& shapes, const Sizes& s)
      : type_(accumulate_type(value.scalar_type())),
        value_(in_layout(value, s, type_)),
        places_(dense(places, type_)),
        weights_(dense(weights, type_)),
        references_(dense(references == nullptr ? weights_ : *references, type_)) {
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
    const bool apart = head_major(s);
    task_ = {s.pixels,
             s.heads,
             s.channels,
             s.queries,
             s.levels,
             s.levels * s.points,
             width_.data(),
             height_.data(),
             start_.data(),
             value_.const_data_ptr<Real>(),
             s.pixels * s.heads * s.channels,
             apart ? s.pixels * s.channels : s.channels,
             apart ? s.channels : s.heads * s.channels,
             places_.const_data_ptr<Real>(),
             weights_.const_data_ptr<Real>(),
             references == nullptr ? nullptr : references_.const_data_ptr<Real>(),
             references == nullptr ? 0 : references->size(3)};
  }
  Input(const Input&) = delete;
  const Task<Real>& task() const { return task_; }

 private:
  ScalarType type_;
  Tensor value_, places_, weights_, references_;
  std::vector<int32_t> width_, height_, start_;
  Task<Real> task_;
};

// Calls run(scratch, begin, end) in the threads of torch's pool, for ranges of at least `grain` within 0 to `count`.
template <typename Real, typename Run>
void in_parallel(const Task<Real>& task, int64_t count, int64_t grain, const Run& run) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    constexpr std::uintptr_t line = 64;  // bytes; a vector on two cache lines is slower
    std::vector<Real> scratch(static_cast<size_t>(scratch_size(task.points)) + line / sizeof(Real));
    const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(scratch.data()) + line - 1) / line * line;
    run(reinterpret_cast<Real*>(start), begin, end);
  });
}

constexpr int64_t kRowGrain = 128;  // minimum rows per thread: about 10 us

template <typename Real>
Tensor forward(const Tensor& value, const Tensor* references, const Tensor& places, const Tensor& weights,
               const std::vector<int64_t>& shapes, const Sizes& s) {
  const ScalarType type = accumulate_type(value.scalar_type());
  const Tensor output = torch::stable::new_empty(value, {s.batch, s.queries, s.heads * s.channels}, type);
  if (output.numel() > 0) {
    const Input<Real> input(value, references, places, weights, shapes, s);
    const Task<Real>& task = input.task();
    Real* into = output.mutable_data_ptr<Real>();
    in_parallel(task, s.batch * s.heads * s.queries, kRowGrain, [&](Real* scratch, int64_t begin, int64_t end) {
      kernels<Real>().forward(task, into, scratch, begin, end);
    });
  }
  return torch::stable::to(output, value.scalar_type());
}

// Sums the heads' parts [N, Q, M, size] of a gradient to [N, Q, size].
template <typename Real>
void add_heads(const Real* shares, Real* into, int64_t queries, int64_t heads, int64_t size) {
  torch::stable::parallel_for(0, queries, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < size; ++i) into[query * size + i] += shares[(query * heads + head) * size + i];
  });
}

struct Wanted {
  bool value, references, places, weights;
};

struct Result {
  Tensor value, references, places, weights;
};

template <typename Real>
Result backward(const Tensor& grad_output, const Tensor& value, const Tensor* references, const Tensor& places,
                const Tensor& weights, const std::vector<int64_t>& shapes, const Wanted& wanted, const Sizes& s) {
  using torch::stable::new_empty;
  using torch::stable::new_zeros;
  const ScalarType type = accumulate_type(value.scalar_type());
  const bool apart = head_major(s);
  std::vector<int64_t> layout = {s.batch, s.pixels, s.heads, s.channels};
  if (apart) std::swap(layout[1], layout[2]);
  const int64_t reference = references == nullptr ? 0 : s.levels * references->size(3);  // numbers per query
  const Tensor grad_value = wanted.value ? new_empty(value, layout, type) : nothing(value);
  const Tensor grad_references = wanted.references ? new_zeros(*references, references->sizes(), type) : nothing(value);
  const Tensor grad_places = wanted.places ? new_empty(places, places.sizes(), type) : nothing(places);
  const Tensor grad_weights = wanted.weights ? new_empty(weights, weights.sizes(), type) : nothing(weights);
  const int64_t pairs = s.batch * s.heads, rows = pairs * s.queries;
  if (pairs > 0) {
    const Tensor dense_grad = dense(grad_output, type);
    const Tensor shares =
        wanted.references ? new_zeros(value, {s.batch, s.queries, s.heads, reference}, type) : nothing(value);
    const Input<Real> input(value, references, places, weights, shapes, s);
    const Task<Real>& task = input.task();
    const Real* grad = dense_grad.const_data_ptr<Real>();
    const auto data = [](bool want, const Tensor& tensor) { return want ? tensor.mutable_data_ptr<Real>() : nullptr; };
    const Gradients<Real> into{data(wanted.value, grad_value), data(wanted.places, grad_places),
                               data(wanted.weights, grad_weights), data(wanted.references, shares)};
    if (torch::stable::get_num_threads() <= pairs || rows * s.points == 0) {
      in_parallel(task, pairs, 1, [&](Real* scratch, int64_t begin, int64_t end) {
        kernels<Real>().backward(task, grad, into, scratch, begin, end);
      });
    } else {  // two passes instead of one, but with work for all threads
      if (wanted.places || wanted.weights || wanted.references)
        in_parallel(task, rows, kRowGrain, [&](Real* scratch, int64_t begin, int64_t end) {
          kernels<Real>().backward_rows(task, grad, into, scratch, begin, end);
        });
      if (wanted.value)
        in_parallel(task, pairs * s.levels, 1, [&](Real* scratch, int64_t begin, int64_t end) {
          kernels<Real>().backward_levels(task, grad, into, scratch, begin, end);
        });
    }
    if (wanted.references)
      add_heads(shares.const_data_ptr<Real>(), grad_references.mutable_data_ptr<Real>(), s.batch * s.queries, s.heads,
                reference);
  }
  const auto as = [](bool want, const Tensor& grad, ScalarType stored) {
    return want ? torch::stable::to(grad, stored) : grad;
  };
  return {wanted.value ? dense(apart ? torch::stable::transpose(grad_value, 1, 2) : grad_value, value.scalar_type())
                       : grad_value,
          grad_references, as(wanted.places, grad_places, places.scalar_type()),
          as(wanted.weights, grad_weights, weights.scalar_type())};
}

Tensor forward_cpu(const Tensor& value, const Tensor& locations, const Tensor& weights, std::vector<int64_t> shapes) {
  const Sizes s = check(value, locations, weights, shapes);
  const bool twice = value.scalar_type() == ScalarType::Double;
  return (twice ? forward<double> : forward<float>)(value, nullptr, locations, weights, shapes, s);
}

Tensor forward_fused_cpu(const Tensor& value, const Tensor& references, const Tensor& offsets, const Tensor& logits,
                         std::vector<int64_t> shapes) {
  const Sizes s = check_fused(value, references, offsets, logits, shapes);
  const bool twice = value.scalar_type() == ScalarType::Double;
  return (twice ? forward<double> : forward<float>)(value, &references, offsets, logits, shapes, s);
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& value, const Tensor& locations,
                                                const Tensor& weights, std::vector<int64_t> shapes,
                                                std::vector<bool> wanted) {
  const Sizes s = check(value, locations, weights, shapes);
  check_grad_output(grad_output, value, s);
  STD_TORCH_CHECK(wanted.size() == 3, "ms_deform_attn: wanted must hold 3 booleans");
  const bool twice = value.scalar_type() == ScalarType::Double;
  const Result r = (twice ? backward<double> : backward<float>)(
      grad_output, value, nullptr, locations, weights, shapes, {wanted[0], false, wanted[1], wanted[2]}, s);
  return {r.value, r.places, r.weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_fused_cpu(const Tensor& grad_output, const Tensor& value,
                                                              const Tensor& references, const Tensor& offsets,
                                                              const Tensor& logits, std::vector<int64_t> shapes,
                                                              std::vector<bool> wanted) {
  const Sizes s = check_fused(value, references, offsets, logits, shapes);
  check_grad_output(grad_output, value, s);
  STD_TORCH_CHECK(wanted.size() == 4, "ms_deform_attn_fused: wanted must hold 4 booleans");
  const bool twice = value.scalar_type() == ScalarType::Double;
  const Result r = (twice ? backward<double> : backward<float>)(
      grad_output, value, &references, offsets, logits, shapes, {wanted[0], wanted[1], wanted[2], wanted[3]}, s);
  return {r.value, r.references, r.places, r.weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deformable_detr, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cpu));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&forward_fused_cpu));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&backward_fused_cpu));
}

}  // namespace msda

// For build.py, through ctypes: sets the instruction set to `wanted`, if it is not null and this processor has it; returns
// the one in use.
extern "C" __attribute__((visibility("default"))) const char* msda_instruction_set(const char* wanted) {
  if (wanted != nullptr)
    if (const msda::KernelSet* set = msda::choose(wanted)) msda::chosen() = set;
  return msda::chosen().load()->name;
}

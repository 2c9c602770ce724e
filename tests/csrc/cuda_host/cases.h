// One run of the operator on the CPU, as tests/csrc/test_cuda_host.py asks for it.

#pragma once

#include <stdint.h>
#include <string.h>

#include <memory>
#include <vector>

#include "ms_deform_attn_launch.cuh"

constexpr int32_t kProcessors = 3;  // of the GPU that is pretended

enum Operation : int64_t { plain_forward, plain_backward, fused_forward, fused_backward };

struct Case {
  int64_t operation, type, ordered, kernels, seed, misaligned, reference_size;  // misaligned: bytes
  msda::Geometry geometry;
};

// An array of exactly its size on the heap, so that AddressSanitizer sees any access beside it.
template <typename T>
class Array {
 public:
  Array(int64_t count, int64_t misaligned, int fill)
      : bytes_(count * sizeof(T)), memory_(new char[misaligned + bytes_]), data_(memory_.get() + misaligned) {
    memset(memory_.get(), fill, misaligned + bytes_);
  }
  T* get() const { return reinterpret_cast<T*>(data_); }
  char* bytes() const { return data_; }
  int64_t size() const { return bytes_; }

 private:
  int64_t bytes_;
  std::unique_ptr<char[]> memory_;
  char* data_;
};

struct Streams {
  std::vector<char> in, out;
  size_t read = 0;

  template <typename T>
  Array<T> take(int64_t count, int64_t misaligned) {
    Array<T> array(count, misaligned, 0);
    memcpy(array.bytes(), in.data() + read, array.size());
    read += array.size();
    return array;
  }
  template <typename T>
  void give(const Array<T>& array) {
    out.insert(out.end(), array.bytes(), array.bytes() + array.size());
  }
};

template <typename Value, typename Real>
void run_case(const Case& c, Streams& io) {
  using namespace msda;
  const Geometry& g = c.geometry;
  const Kernels kernels{static_cast<uint32_t>(c.kernels), kProcessors};
  const int64_t values = g.batch * g.pixels * g.heads * g.channels, outputs = g.batch * g.queries * g.heads * g.channels;
  const int64_t points = g.batch * g.queries * g.heads * g.levels * g.points;
  const int64_t references = g.batch * g.queries * g.levels * c.reference_size;
  constexpr int kNaN = 0xff;
  const auto chosen = c.ordered ? backward_ordered<Value, Real> : backward<Value, Real>;
  const bool backwards = c.operation == plain_backward || c.operation == fused_backward;
  const auto grad_output = io.take<Value>(backwards ? outputs : 0, 0);
  const auto value = io.take<Value>(values, c.misaligned);
  Array<Value> output(backwards ? 0 : outputs, 0, kNaN);
  Array<Real> grad_value(backwards ? values : 0, 0, 0);
  bool fast = false;
  if (c.operation == plain_forward || c.operation == plain_backward) {
    const auto locations = io.take<Real>(2 * points, 0), weights = io.take<Real>(points, 0);
    Array<Real> grad_locations(backwards ? 2 * points : 0, 0, kNaN), grad_weights(backwards ? points : 0, 0, kNaN);
    if (backwards)
      fast = chosen(g, kernels, grad_output.get(), value.get(), locations.get(), weights.get(), grad_value.get(),
                      grad_locations.get(), grad_weights.get(), nullptr);
    else
      fast = forward(g, kernels, value.get(), locations.get(), weights.get(), output.get(), nullptr);
    io.give(output), io.give(grad_value), io.give(grad_locations), io.give(grad_weights);
  } else {
    const auto reference = io.take<Real>(references, 0);
    const auto offsets = io.take<Value>(2 * points, 0), logits = io.take<Value>(points, 0);
    Array<Real> grad_references(backwards ? references : 0, 0, 0);
    Array<Value> grad_offsets(backwards ? 2 * points : 0, 0, kNaN), grad_logits(backwards ? points : 0, 0, kNaN);
    const int32_t size = static_cast<int32_t>(c.reference_size);
    if constexpr (std::is_same_v<Real, float>) {
      const FusedInputs<Value> in{reference.get(), size, offsets.get(), logits.get()};
      if (backwards && !c.ordered)
        fast = backward_fused(g, kernels, grad_output.get(), value.get(), in, grad_value.get(), grad_references.get(),
                              grad_offsets.get(), grad_logits.get(), nullptr);
      if (!backwards)
        fast = forward_fused(g, kernels, value.get(), in, output.get(), nullptr);
    }
    if (!fast) {
      Array<Real> locations(2 * points, 0, kNaN), weights(points, 0, kNaN);
      expand(g, size, reference.get(), offsets.get(), logits.get(), locations.get(), weights.get(), nullptr);
      if (backwards) {
        Array<Real> grad_locations(2 * points, 0, kNaN), grad_weights(points, 0, kNaN);
        chosen(g, kernels, grad_output.get(), value.get(), locations.get(), weights.get(), grad_value.get(),
                 grad_locations.get(), grad_weights.get(), nullptr);
        fold(g, size, reference.get(), offsets.get(), weights.get(), grad_locations.get(), grad_weights.get(),
             grad_references.get(), grad_offsets.get(), grad_logits.get(), nullptr);
      } else {
        forward(g, kernels, value.get(), locations.get(), weights.get(), output.get(), nullptr);
      }
    }
    io.give(output), io.give(grad_value), io.give(grad_references), io.give(grad_offsets), io.give(grad_logits);
  }
  Array<int64_t> flag(1, 0, 0);
  *flag.get() = fast;
  io.give(flag);
}

void run_float32(const Case& c, Streams& io);
void run_float64(const Case& c, Streams& io);
void run_bfloat16(const Case& c, Streams& io);
void run_float16(const Case& c, Streams& io);

// Selects the kernel: the fast one if sizes and addresses allow it, else the generic one. Pointers are to dense tensors on
// the current device. Nothing here waits for the GPU, allocates, or uses torch.

#pragma once

#include <type_traits>

#include "ms_deform_attn_fast_backward.cuh"
#include "ms_deform_attn_fused.cuh"
#include "ms_deform_attn_generic.cuh"
#include "ms_deform_attn_ordered.cuh"
#include "ms_deform_attn_specialised.cuh"

namespace msda {

// The caller's choice of kernels; with nothing set, the shipped ones. kernels.py has the bits' names. Where a kernel that
// is asked for does not support the sizes, the shipped one runs.
struct Kernels {
  enum Bit : uint32_t {
    kGeneric = 1,      // no fast kernel
    kSpecialised = 2,  // the forward for 4 levels, 4 points and 32 channels
    kSectors = 4,      // the backward of 16-bit types that fills its sectors
    kLargeTiles = 8,   // rectangles of 16 x 16 queries
    kNeighbours = 16,  // neighbouring tiles on one processor
  };
  uint32_t chosen = 0;
  int32_t processors = 0;  // of the GPU; used with kNeighbours

  bool has(Bit bit) const { return (chosen & bit) != 0; }
  Tiles tiles(const Geometry& g, int rows) const {
    return make_tiles(g, rows, has(kLargeTiles), has(kNeighbours) ? processors : 0);
  }
};

template <typename Value>
struct FusedInputs {
  const float* references;
  int32_t size;  // coordinates of a reference: 2 or 4
  const Value *offsets, *logits;
};

template <typename... Pointers>
bool vector_aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Lanes per row of the fast kernels; 0: only the generic kernels support these sizes.
template <typename Value>
int fast_lanes(const Geometry& g, const Kernels& kernels) {
  if (kernels.has(Kernels::kGeneric) || sizeof(Value) > 4) return 0;
  if (g.channels != 16 && g.channels != 32 && g.channels != 64 && g.channels != 128) return 0;
  if (g.pixels * g.heads * g.channels > 0x7fffffff / 4 || int64_t{g.levels} * g.points > 0x7fffffff / 2) return 0;
  const int lanes = static_cast<int>(g.channels) / kVector<Value>;
  if ((g.queries + 8 * g.pixels) * g.heads * g.batch > 0x7fffffff) return 0;  // limit of a grid's blocks, with margin
  return lanes;
}

// Calls run(std::integral_constant<int, lanes>).
template <typename Run>
void with_lanes(int lanes, const Run& run) {
  switch (lanes) {
    case 2:
      return run(std::integral_constant<int, 2>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 8:
      return run(std::integral_constant<int, 8>());
    case 16:
      return run(std::integral_constant<int, 16>());
    default:
      return run(std::integral_constant<int, 32>());
  }
}

// fp32 rows have 4 to 32 lanes, those of 16-bit types 2 to 16.
template <typename Value, int kLanes>
constexpr bool kPossible = kLanes * kVector<Value> >= 16 && kLanes * kVector<Value> <= 128;

template <typename Value, typename Points>
void fast_forward(const Geometry& g, const Kernels& kernels, int lanes, const Value* value, const Points& points,
                  Value* output, cudaStream_t stream) {
  with_lanes(lanes, [&](auto constant) {
    constexpr int kLanes = decltype(constant)::value;
    if constexpr (kPossible<Value, kLanes>) {
      const Tiles tiles = kernels.tiles(g, kBlock / kLanes);
      launch(fast_forward_kernel<Value, kLanes, Points>, blocks_of(g, tiles), stream, g, tiles, value, points, output);
    }
  });
}

template <typename Value, typename Points>
void fast_backward(const Geometry& g, const Kernels& kernels, int lanes, const Value* grad_output, const Value* value,
                   const Points& points, float* grad_value, cudaStream_t stream) {
  with_lanes(lanes, [&](auto constant) {
    constexpr int kLanes = decltype(constant)::value;
    if constexpr (kPossible<Value, kLanes>) {
      const Tiles tiles = kernels.tiles(g, kBlock / kLanes);
      auto* kernel = fast_backward_kernel<Value, kLanes, Points, false>;
      if constexpr (sizeof(Value) == 2)
        if (kernels.has(Kernels::kSectors)) kernel = fast_backward_kernel<Value, kLanes, Points, true>;
      launch(kernel, blocks_of(g, tiles), stream, g, tiles, grad_output, value, points, grad_value);
    }
  });
}

// Whether the specialised kernel runs; with large tiles a block has twice the threads, so that as many rows are in flight.
template <typename Value>
bool specialised_forward(const Geometry& g, const Kernels& kernels, const Value* value, const FusedInputs<Value>& in,
                         Value* output, cudaStream_t stream) {
  constexpr int kLevels = 4, kPoints = 4, kChannels = 32, kLanes = kChannels / kVector<Value>, kLarge = 2 * kBlock;
  if (!kernels.has(Kernels::kSpecialised) || g.channels != kChannels || g.levels != kLevels || g.points != kPoints ||
      in.size != 2)
    return false;
  const auto run = [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    const Tiles tiles = kernels.tiles(g, kThreads / kLanes);
    launch<kThreads>(specialised_forward_kernel<Value, kLanes, kThreads, kLevels, kPoints>, blocks_of(g, tiles), stream,
                     g, tiles, value, in.references, in.offsets, in.logits, output);
  };
  if (kernels.has(Kernels::kLargeTiles))
    run(std::integral_constant<int, kLarge>());
  else
    run(std::integral_constant<int, kBlock>());
  return true;
}

// output = sum of samples; true if the fast kernel ran.
template <typename Value, typename Real>
bool forward(const Geometry& g, const Kernels& kernels, const Value* value, const Real* locations, const Real* weights,
             Value* output, cudaStream_t stream) {
  if constexpr (std::is_same_v<Real, float>) {
    const int lanes = fast_lanes<Value>(g, kernels);
    if (lanes != 0 && vector_aligned(value, locations, output)) {
      fast_forward(g, kernels, lanes, value, PlainPoints<Value>{locations, weights, nullptr, nullptr}, output, stream);
      return true;
    }
  }
  launch(forward_kernel<Value, Real>, blocks_for(g.batch * g.queries * g.heads, kBlock / kWarp), stream, g, value,
         locations, weights, output);
  return false;
}

// Gradients that are null are not wanted; grad_value is zeroed and of the accumulation type.
template <typename Value, typename Real>
bool backward(const Geometry& g, const Kernels& kernels, const Value* grad_output, const Value* value,
              const Real* locations, const Real* weights, Real* grad_value, Real* grad_locations, Real* grad_weights,
              cudaStream_t stream) {
  if constexpr (std::is_same_v<Real, float>) {
    const int lanes = fast_lanes<Value>(g, kernels);
    if (lanes != 0 && vector_aligned(grad_output, value, locations, grad_value, grad_locations)) {
      fast_backward(g, kernels, lanes, grad_output, value,
                    PlainPoints<Value>{locations, weights, grad_locations, grad_weights}, grad_value, stream);
      return true;
    }
  }
  launch(backward_kernel<Value, Real>, blocks_for(g.batch * g.queries * g.heads, kBlock / kWarp), stream, g,
         grad_output, value, locations, weights, grad_value, grad_locations, grad_weights);
  return false;
}

// The same with the sums of grad_value in a fixed order; several times slower.
template <typename Value, typename Real>
bool backward_ordered(const Geometry& g, const Kernels& kernels, const Value* grad_output, const Value* value,
                      const Real* locations, const Real* weights, Real* grad_value, Real* grad_locations,
                      Real* grad_weights, cudaStream_t stream) {
  if (grad_value != nullptr)
    launch(ordered_kernel<Value, Real>, blocks_for(g.batch * g.heads * g.levels * kBands, kBlock / kWarp), stream, g,
           grad_output, locations, weights, grad_value);
  if (grad_locations == nullptr && grad_weights == nullptr) return false;
  return backward(g, kernels, grad_output, value, locations, weights, static_cast<Real*>(nullptr), grad_locations,
                  grad_weights, stream);
}

// The fused forms have no generic kernel. If they return false, nothing was done, and the caller must use `expand`, the
// plain kernels and `fold`.
template <typename Value>
bool forward_fused(const Geometry& g, const Kernels& kernels, const Value* value, const FusedInputs<Value>& in,
                   Value* output, cudaStream_t stream) {
  const int lanes = fast_lanes<Value>(g, kernels);
  if (lanes == 0 || !vector_aligned(value, in.references, in.offsets, output)) return false;
  if (specialised_forward(g, kernels, value, in, output, stream)) return true;
  fast_forward(g, kernels, lanes, value,
               FusedPoints<Value>{in.references, in.size, in.offsets, in.logits, nullptr, nullptr, nullptr}, output,
               stream);
  return true;
}

// grad_references is zeroed as well.
template <typename Value>
bool backward_fused(const Geometry& g, const Kernels& kernels, const Value* grad_output, const Value* value,
                    const FusedInputs<Value>& in, float* grad_value, float* grad_references, Value* grad_offsets,
                    Value* grad_logits, cudaStream_t stream) {
  const int lanes = fast_lanes<Value>(g, kernels);
  if (lanes == 0 || g.levels * g.points > kMaxFusedPoints ||
      !vector_aligned(grad_output, value, in.references, in.offsets, grad_value, grad_offsets))
    return false;
  fast_backward(
      g, kernels, lanes, grad_output, value,
      FusedPoints<Value>{in.references, in.size, in.offsets, in.logits, grad_references, grad_offsets, grad_logits},
      grad_value, stream);
  return true;
}

template <typename Value, typename Real>
void expand(const Geometry& g, int32_t size, const Real* references, const Value* offsets, const Value* logits,
            Real* locations, Real* weights, cudaStream_t stream) {
  launch(expand_kernel<Value, Real>, blocks_for(g.batch * g.queries * g.heads, kBlock), stream, g, size, references,
         offsets, logits, locations, weights);
}

template <typename Value, typename Real>
void fold(const Geometry& g, int32_t size, const Real* references, const Value* offsets, const Real* weights,
          const Real* grad_locations, const Real* grad_weights, Real* grad_references, Value* grad_offsets,
          Value* grad_logits, cudaStream_t stream) {
  if (grad_offsets != nullptr || grad_logits != nullptr)
    launch(fold_kernel<Value, Real>, blocks_for(g.batch * g.queries * g.heads, kBlock), stream, g, size, references,
           weights, grad_locations, grad_weights, grad_offsets, grad_logits);
  if (grad_references != nullptr)
    launch(fold_references_kernel<Value, Real>, blocks_for(g.batch * g.queries * g.levels, kBlock), stream, g, size,
           offsets, grad_locations, grad_references);
}

}  // namespace msda

// Activations of the feed-forward.
#pragma once

#include "cuda/sm90/values.cuh"
#include "sidmlp/encoder_view.h"

namespace sidmlp::cuda::sm90 {

// x / 2 (1 + tanh(y)) with tanh(y) = 2 / (1 + e^-2y) - 1, y = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh(float x) {
  constexpr float kScale = -2.0f * 0.7978845608f * 1.4426950409f;
  const float y = kScale * fmaf(0.044715f * x * x, x, x);
  return x * ptx::reciprocal(1.0f + ptx::exp2(y));
}

template <class W>
__device__ __forceinline__ float activate(Activation activation, float x) {
  if (activation == Activation::kGelu) return gelu_unit<W> * gelu<W>(x);
  if (activation == Activation::kGatedGelu) return gelu_tanh(x);
  return x < 0.0f ? 0.0f : x;  // keeps a NaN
}

}  // namespace sidmlp::cuda::sm90

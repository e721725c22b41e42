// Eight half-precision numbers at a time, and the activation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/ptx/math.cuh"
#include "cuda/sm90/shape.h"
#include "cuda/warp.cuh"

namespace sidmlp::cuda::sm90 {

// Two numbers of a 32-bit word, the lower first.
template <class W>
__device__ __forceinline__ float2 widen_two(uint32_t word);
template <>
__device__ __forceinline__ float2 widen_two<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen_two<__half>(uint32_t word) {
  __half2 two;
  memcpy(&two, &word, sizeof(two));
  return __half22float2(two);
}

template <class W>
__device__ __forceinline__ uint32_t narrow_two(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrow_two<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &two, sizeof(word));
  return word;
}
template <>
__device__ __forceinline__ uint32_t narrow_two<__half>(float low, float high) {
  const __half2 two = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &two, sizeof(word));
  return word;
}

template <class W>
__device__ __forceinline__ void widen_eight(const uint4& raw, float (&x)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = widen_two<W>(words[i]);
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

// x Phi(x) in units of gelu_unit<W>, fitted to the precision of W. A unit is a power of two, so
// whoever sums products takes it back without rounding.
template <class W>
constexpr float gelu_unit = 1.0f;
template <>
constexpr float gelu_unit<__nv_bfloat16> = 0.5f;

template <class W>
__device__ __forceinline__ float gelu(float x);

// Phi by the tanh of an odd polynomial, off by at most 2.6e-5 in x Phi(x), and the unit's tanh by
// 2^-11 relative: an eighth of a rounding to bf16 at 1. Beyond x^2 = 30 the polynomial bends back
// and tanh is 1.
template <>
__device__ __forceinline__ float gelu<__nv_bfloat16>(float x) {
  const float u = fminf(x * x, 30.0f);
  const float p = fmaf(fmaf(-3.51708637e-04f, u, 3.70068271e-02f), u, 7.97506586e-01f);
  return fmaf(x, ptx::tanh(x * p), x);
}

// Phi by the sigmoid of an odd polynomial, off by at most 3.1e-6 in x Phi(x): the fit of
// sidmlp_kernels/ops/triton/common.py.
template <>
__device__ __forceinline__ float gelu<__half>(float x) {
  const float u = x * x;
  float p = fmaf(-3.2289869e-06f, u, 8.8238107e-05f);
  p = fmaf(p, u, 3.6027472e-04f);
  p = fmaf(p, u, -1.0522668e-01f);
  p = fmaf(p, u, -2.3020453e00f);
  return x * ptx::reciprocal(1.0f + ptx::exp2(x * p));
}

}  // namespace sidmlp::cuda::sm90

// Eight numbers of any weight type at a time, and the activation of a hidden row.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/matrices.cuh"
#include "cuda/sm90/values.cuh"

namespace sidmlp::cuda::sm90 {

__device__ __forceinline__ uint4 words_of(float a, float b, float c, float d) {
  return {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)};
}

template <class W>
struct Numbers {                                // half precision
  static constexpr float kUnit = gelu_unit<W>;  // of what `gelu` gives

  static __device__ __forceinline__ void load(const W* from, float (&x)[8]) {
    widen_eight<W>(__ldg(reinterpret_cast<const uint4*>(from)), x);
  }
  static __device__ __forceinline__ void load(uint32_t shared, float (&x)[8]) {
    widen_eight<W>(ptx::load_piece(shared), x);
  }
  static __device__ __forceinline__ void store(uint32_t shared, const float (&x)[8]) {
    ptx::store_piece(shared, {narrow_two<W>(x[0], x[1]), narrow_two<W>(x[2], x[3]),
                              narrow_two<W>(x[4], x[5]), narrow_two<W>(x[6], x[7])});
  }
  static __device__ __forceinline__ void store_two(uint32_t shared, float low, float high) {
    ptx::store_word(shared, narrow_two<W>(low, high));
  }
  static __device__ __forceinline__ void store_four(W* to, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(to) = {narrow_two<W>(x[0], x[1]), narrow_two<W>(x[2], x[3])};
  }
  static __device__ __forceinline__ float activate(float x) { return gelu<W>(x); }
};

template <>
struct Numbers<float> {
  static constexpr float kUnit = 1.0f;

  static __device__ __forceinline__ void load(const float* from, float (&x)[8]) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(from));
    const float4 b = __ldg(reinterpret_cast<const float4*>(from) + 1);
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
    x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  }
  static __device__ __forceinline__ void load(uint32_t shared, float (&x)[8]) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint4 raw = ptx::load_piece(shared + 16 * half);
      x[4 * half] = __uint_as_float(raw.x), x[4 * half + 1] = __uint_as_float(raw.y);
      x[4 * half + 2] = __uint_as_float(raw.z), x[4 * half + 3] = __uint_as_float(raw.w);
    }
  }
  static __device__ __forceinline__ void store(uint32_t shared, const float (&x)[8]) {
    ptx::store_piece(shared, words_of(x[0], x[1], x[2], x[3]));
    ptx::store_piece(shared + 16, words_of(x[4], x[5], x[6], x[7]));
  }
  static __device__ __forceinline__ void store_two(uint32_t shared, float low, float high) {
    ptx::store_half_piece(shared, {__float_as_uint(low), __float_as_uint(high)});
  }
  static __device__ __forceinline__ void store_four(float* to, const float (&x)[4]) {
    *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
  }
  static __device__ __forceinline__ float activate(float x) {  // x Phi(x)
    return 0.5f * x * (1.0f + erff(x * 0.707106781f));
  }
};

}  // namespace sidmlp::cuda::sm90

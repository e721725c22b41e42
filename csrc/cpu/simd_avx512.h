// Sixteen floats in one AVX-512 register. Needs AVX-512F only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace sidmlp::cpu::avx512 {
namespace {

constexpr int kTileRows = 6, kTileVectors = 4;  // 24 accumulators of 32 registers
constexpr int kDotRows = 4;                     // 4 x 4 tile: 16 accumulators

struct Vec {
  __m512 v;
};

inline Vec vec_set(float x) { return {_mm512_set1_ps(x)}; }
inline Vec vec_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void vec_store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec vec_add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec vec_sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec vec_mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec vec_div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec vec_fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec vec_min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec vec_max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec vec_abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// x >= 0 ? a : b, lane by lane
inline Vec vec_select_nonnegative(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_GE_OQ), b.v, a.v)};
}
inline Vec vec_round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// 2^n for integral n in [-126, 127]
inline Vec vec_exp2_integral(Vec n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

inline __m128 fold(Vec a) {
  const __m256 hi = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), hi);
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
// The sums of four vectors, each by the same tree whatever its position.
inline void vec_sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d))));
}
inline float vec_sum(Vec a) {
  const __m128 pairs = _mm_hadd_ps(fold(a), fold(a));
  return _mm_cvtss_f32(_mm_hadd_ps(pairs, pairs));
}
inline float vec_largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

inline Vec vec_load_bfloat16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec vec_load_float16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

// Rounded to nearest even; NaN stays NaN.
inline void vec_store_bfloat16(uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i kept = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded,
                                               _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
inline void vec_store_float16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#if defined(__AVX512BF16__)
// Sixteen pairs of bfloat16.
struct Pairs {
  __m512bh v;
};
inline Pairs pairs_load(const uint32_t* p) {
  return {reinterpret_cast<__m512bh>(_mm512_loadu_si512(p))};
}
inline Pairs pairs_set(uint32_t pair) {
  return {reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair)))};
}
// 16 pairs (first[i], second[i]).
inline void pairs_store(uint32_t* p, const uint16_t* first, const uint16_t* second) {
  auto widen = [](const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  _mm512_storeu_si512(p, _mm512_or_si512(widen(first), _mm512_slli_epi32(widen(second), 16)));
}
// acc + x[0] w[0] + x[1] w[1], lane by lane.
inline Vec vec_dot_bfloat16(Pairs x, Pairs w, Vec acc) {
  return {_mm512_dpbf16_ps(acc.v, x.v, w.v)};
}
#endif

}  // namespace
}  // namespace sidmlp::cpu::avx512

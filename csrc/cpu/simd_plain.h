// Sixteen floats without any vector extension: the form that runs everywhere and that tests can
// force.
#pragma once

#include <cstdint>
#include <cstring>

namespace sidmlp::cpu::plain {
namespace {

constexpr int kTileRows = 2, kTileVectors = 1;  // GEMM register tile: rows x vectors of 16 columns
constexpr int kDotRows = 1;  // hidden rows of one dot-product tile (by 4 weight rows)

struct Vec {
  float lane[16];
};

#define SIDMLP_LANES(expression)                         \
  Vec r;                                                 \
  for (int i = 0; i < 16; ++i) r.lane[i] = (expression); \
  return r

inline Vec vec_set(float x) { SIDMLP_LANES(x); }
inline Vec vec_load(const float* p) { SIDMLP_LANES(p[i]); }
inline void vec_store(float* p, Vec a) { memcpy(p, a.lane, sizeof(a.lane)); }
inline Vec vec_add(Vec a, Vec b) { SIDMLP_LANES(a.lane[i] + b.lane[i]); }
inline Vec vec_sub(Vec a, Vec b) { SIDMLP_LANES(a.lane[i] - b.lane[i]); }
inline Vec vec_mul(Vec a, Vec b) { SIDMLP_LANES(a.lane[i] * b.lane[i]); }
inline Vec vec_div(Vec a, Vec b) { SIDMLP_LANES(a.lane[i] / b.lane[i]); }
inline Vec vec_fma(Vec a, Vec b, Vec c) { SIDMLP_LANES(a.lane[i] * b.lane[i] + c.lane[i]); }
inline Vec vec_min(Vec a, Vec b) { SIDMLP_LANES(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]); }
inline Vec vec_max(Vec a, Vec b) { SIDMLP_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
inline Vec vec_abs(Vec a) { SIDMLP_LANES(a.lane[i] < 0 ? -a.lane[i] : a.lane[i]); }
// x >= 0 ? a : b, lane by lane
inline Vec vec_select_nonnegative(Vec x, Vec a, Vec b) {
  SIDMLP_LANES(x.lane[i] >= 0.0f ? a.lane[i] : b.lane[i]);
}
inline Vec vec_round(Vec a) { SIDMLP_LANES(__builtin_rintf(a.lane[i])); }
// 2^n for integral n in [-126, 127]
inline Vec vec_exp2_integral(Vec n) {
  Vec r;
  for (int i = 0; i < 16; ++i) {
    const int32_t bits = (static_cast<int32_t>(n.lane[i]) + 127) << 23;
    memcpy(&r.lane[i], &bits, sizeof(bits));
  }
  return r;
}

inline float tree_sum(const float* v, int n) {
  return n == 1 ? v[0] : tree_sum(v, n / 2) + tree_sum(v + n / 2, n / 2);
}
inline float vec_sum(Vec a) { return tree_sum(a.lane, 16); }
inline float vec_largest(Vec a) {
  float m = a.lane[0];
  for (int i = 1; i < 16; ++i) m = a.lane[i] > m ? a.lane[i] : m;
  return m;
}
// The sums of four vectors, each by the same tree whatever its position.
inline void vec_sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = vec_sum(a), out[1] = vec_sum(b), out[2] = vec_sum(c), out[3] = vec_sum(d);
}

inline float bfloat16_value(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &bits, sizeof(f));
  return f;
}
inline float float16_value(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = h >> 10 & 0x1fu, mantissa = h & 0x3ffu;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // zero and subnormals
  } else {
    const uint32_t bits =
        exponent == 31 ? 0x7f800000u | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    memcpy(&magnitude, &bits, sizeof(magnitude));
  }
  uint32_t bits;
  memcpy(&bits, &magnitude, sizeof(bits));
  bits |= sign;
  memcpy(&magnitude, &bits, sizeof(magnitude));
  return magnitude;
}
inline Vec vec_load_bfloat16(const uint16_t* p) { SIDMLP_LANES(bfloat16_value(p[i])); }
inline Vec vec_load_float16(const uint16_t* p) { SIDMLP_LANES(float16_value(p[i])); }

// Rounded to nearest even; NaN stays NaN.
inline uint16_t bfloat16_bits(float f) {
  if (f != f) return 0x7fc0u;
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t float16_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u;
  const float magnitude = f < 0 ? -f : f;
  if (f != f) return 0x7e00u;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f)  // zero and subnormals: a multiple of 2^-24
    return static_cast<uint16_t>(sign |
                                 static_cast<uint32_t>(__builtin_rintf(magnitude * 0x1p24f)));
  bits &= 0x7fffffffu;
  const uint32_t rounded = (bits + 0xfffu + (bits >> 13 & 1u)) >> 13;
  return static_cast<uint16_t>(sign | (rounded - (112u << 10)));
}
inline void vec_store_bfloat16(uint16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = bfloat16_bits(a.lane[i]);
}
inline void vec_store_float16(uint16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = float16_bits(a.lane[i]);
}

#undef SIDMLP_LANES

}  // namespace
}  // namespace sidmlp::cpu::plain

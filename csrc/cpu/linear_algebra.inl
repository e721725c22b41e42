// Vector kernels on the sixteen-float `Vec` of the including file's instruction set.
//
// Everything here has internal linkage and calls no library template: a function compiled with
// AVX-512 must never be the copy that the linker keeps for code that runs on an older processor.
//
// Rounding contract (batch invariance): each output is accumulated by one accumulator over the
// inner index in ascending order (gemm), or by sixteen lanes and one fixed tree (dot). Tile shapes
// change which outputs share a load, nothing else.

namespace {

constexpr float kLargestFinite = 3.402823466e38f;

struct Float32 {
  using Storage = float;
  static inline Vec load(const float* p) { return vec_load(p); }
};
struct BFloat16 {
  using Storage = uint16_t;
  static inline Vec load(const uint16_t* p) { return vec_load_bfloat16(p); }
};
struct Float16 {
  using Storage = uint16_t;
  static inline Vec load(const uint16_t* p) { return vec_load_float16(p); }
};

// ---- y[m][n] (+)= sum_k x[m][k] w[k][n] ----

// Partial sums start from zero every kInnerBlock steps and are then added to y: one long running
// sum of 1,024 terms onto a residual loses four times as much as PyTorch does (context error 6e-6
// against 1e-6 at D=128, F=1024; 1.3e-6 with blocks).
constexpr int64_t kInnerBlock = 64;

template <class W, int kRows, int kVectors>
inline void gemm_tile(int64_t inner, const float* x, int64_t x_stride, const typename W::Storage* w,
                      int64_t w_stride, float* y, int64_t y_stride) {
  for (int64_t start = 0; start < inner; start += kInnerBlock) {
    const int64_t end = start + kInnerBlock < inner ? start + kInnerBlock : inner;
    Vec acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = vec_set(0.0f);
    }
    for (int64_t k = start; k < end; ++k) {
      Vec weight[kVectors];
      for (int v = 0; v < kVectors; ++v) weight[v] = W::load(w + k * w_stride + v * kLane);
      for (int r = 0; r < kRows; ++r) {
        const Vec input = vec_set(x[r * x_stride + k]);
        for (int v = 0; v < kVectors; ++v) acc[r][v] = vec_fma(input, weight[v], acc[r][v]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = y + r * y_stride + v * kLane;
        vec_store(at, vec_add(vec_load(at), acc[r][v]));
      }
    }
  }
}

template <class W, int kVectors>
inline void gemm_columns(int64_t rows, int64_t inner, const float* x, int64_t x_stride,
                         const typename W::Storage* w, int64_t w_stride, float* y,
                         int64_t y_stride) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    gemm_tile<W, kTileRows, kVectors>(inner, x + m * x_stride, x_stride, w, w_stride,
                                      y + m * y_stride, y_stride);
  }
  if constexpr (kTileRows > 2) {
    if (m + 4 <= rows) {
      gemm_tile<W, 4, kVectors>(inner, x + m * x_stride, x_stride, w, w_stride, y + m * y_stride,
                                y_stride);
      m += 4;
    }
    if (m + 2 <= rows) {
      gemm_tile<W, 2, kVectors>(inner, x + m * x_stride, x_stride, w, w_stride, y + m * y_stride,
                                y_stride);
      m += 2;
    }
  }
  if (m < rows) {
    gemm_tile<W, 1, kVectors>(inner, x + m * x_stride, x_stride, w, w_stride, y + m * y_stride,
                              y_stride);
  }
}

// y [rows, columns] += x [rows, inner] w [inner, columns]; columns is a multiple of 16. The caller
// sets y's start value.
template <class W>
void gemm_accumulate(int64_t rows, int64_t inner, int64_t columns, const float* x, int64_t x_stride,
                     const typename W::Storage* w, int64_t w_stride, float* y, int64_t y_stride) {
  int64_t n = 0;
  for (; n + kTileVectors * kLane <= columns; n += kTileVectors * kLane) {
    gemm_columns<W, kTileVectors>(rows, inner, x, x_stride, w + n, w_stride, y + n, y_stride);
  }
  for (; n < columns; n += kLane)
    gemm_columns<W, 1>(rows, inner, x, x_stride, w + n, w_stride, y + n, y_stride);
}

inline void fill_rows(float* y, int64_t y_stride, int64_t rows, const float* row, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) memcpy(y + m * y_stride, row, columns * sizeof(float));
}

inline void zero_rows(float* y, int64_t y_stride, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) memset(y + m * y_stride, 0, columns * sizeof(float));
}

// ---- dot products over a multiple of 16 elements ----

template <class W, int kRows>
inline void dot_tile(int64_t inner, const float* x, int64_t x_stride,
                     const typename W::Storage* const w[4], float* out, int64_t out_stride) {
  Vec acc[kRows][4];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 4; ++j) acc[r][j] = vec_set(0.0f);
  }
  for (int64_t k = 0; k < inner; k += kLane) {
    Vec input[kRows];
    for (int r = 0; r < kRows; ++r) input[r] = vec_load(x + r * x_stride + k);
    for (int j = 0; j < 4; ++j) {
      const Vec weight = W::load(w[j] + k);
      for (int r = 0; r < kRows; ++r) acc[r][j] = vec_fma(input[r], weight, acc[r][j]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    vec_sum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3], out + r * out_stride);
}

// out[j] = x . w[code(j)], j < count; writes up to 3 elements past count. `code` maps j to a row of
// w.
template <class W, class CodeOf>
inline void dot_rows(int64_t inner, const float* x, const typename W::Storage* w, int64_t w_stride,
                     int count, CodeOf code, float* out) {
  for (int j = 0; j < count; j += 4) {
    const typename W::Storage* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = w + code(j + i < count ? j + i : j) * w_stride;
    dot_tile<W, 1>(inner, x, 0, rows, out + j, 0);
  }
}

// out[m][n] = x[m] . w[n]; writes up to 3 elements past n = columns in each row.
template <class W>
void dot_matrix(int64_t rows, int64_t inner, int64_t columns, const float* x, int64_t x_stride,
                const typename W::Storage* w, int64_t w_stride, float* out, int64_t out_stride) {
  for (int64_t n = 0; n < columns; n += 4) {
    const typename W::Storage* weight[4];
    for (int i = 0; i < 4; ++i) weight[i] = w + (n + i < columns ? n + i : n) * w_stride;
    int64_t m = 0;
    if constexpr (kDotRows > 1) {
      for (; m + kDotRows <= rows; m += kDotRows) {
        dot_tile<W, kDotRows>(inner, x + m * x_stride, x_stride, weight, out + m * out_stride + n,
                              out_stride);
      }
    }
    for (; m < rows; ++m)
      dot_tile<W, 1>(inner, x + m * x_stride, x_stride, weight, out + m * out_stride + n,
                     out_stride);
  }
}

// ---- elementwise ----

// e^x for x <= 0, relative error below 2e-7; arguments under -87 give about 1e-38.
inline Vec vec_exp_nonpositive(Vec x) {
  x = vec_max(x, vec_set(-87.0f));
  const Vec n = vec_round(vec_mul(x, vec_set(1.44269504f)));
  Vec r = vec_fma(n, vec_set(-0.693359375f), x);  // ln 2 in two parts: 355/512 is exact in few bits
  r = vec_fma(n, vec_set(2.12194440e-4f), r);
  Vec p = vec_set(1.0f / 5040);
  p = vec_fma(p, r, vec_set(1.0f / 720));
  p = vec_fma(p, r, vec_set(1.0f / 120));
  p = vec_fma(p, r, vec_set(1.0f / 24));
  p = vec_fma(p, r, vec_set(1.0f / 6));
  p = vec_fma(p, r, vec_set(0.5f));
  p = vec_fma(p, r, vec_set(1.0f));
  p = vec_fma(p, r, vec_set(1.0f));
  return vec_mul(p, vec_exp2_integral(n));
}

// GELU(x) = x Phi(x) by the error function, as exact as fp32 is: Phi(-t) = exp(-t^2/2) R(t) for t
// >= 0, where R is smooth: a polynomial of degree 7 in 1/(1 + 0.26 t). Its error is below 1.1e-9
// plus rounding; PyTorch's form 0.5 x (1 + erf(x / sqrt 2)) cancels in the negative tail, up
// to 1.2e-6.
inline Vec vec_gelu(Vec x) {
  const Vec t = vec_abs(x);
  const Vec s = vec_div(vec_set(1.0f), vec_fma(t, vec_set(0.26f), vec_set(1.0f)));
  Vec p = vec_set(-0.03418459743261337f);
  p = vec_fma(p, s, vec_set(0.029023021459579468f));
  p = vec_fma(p, s, vec_set(0.3301166892051697f));
  p = vec_fma(p, s, vec_set(-0.35671061277389526f));
  p = vec_fma(p, s, vec_set(0.44491687417030334f));
  p = vec_fma(p, s, vec_set(-0.04933512955904007f));
  p = vec_fma(p, s, vec_set(0.13972505927085876f));
  p = vec_fma(p, s, vec_set(-0.003551311092451215f));
  const Vec q = vec_mul(p, vec_exp_nonpositive(vec_mul(vec_mul(t, t), vec_set(-0.5f))));
  return vec_mul(x, vec_select_nonnegative(x, vec_sub(vec_set(1.0f), q), q));
}

// The same for weights in half precision, a division and an exponential cheaper: Phi(x) = 1/2 + x
// P(x^2) / Q(x^2) with x clamped to +-5.5, degrees 5 and 5. Phi is off by 5.5e-8 at most where it
// is fitted, and by 2e-8 beyond, so large |x| keep that relative error.
inline Vec vec_gelu_fitted(Vec x) {
  const Vec c = vec_min(vec_max(x, vec_set(-5.5f)), vec_set(5.5f));
  const Vec u = vec_mul(c, c);
  Vec p = vec_set(2.221598904839084e-08f);
  p = vec_fma(p, u, vec_set(6.530739938170882e-06f));
  p = vec_fma(p, u, vec_set(0.00018285773694515228f));
  p = vec_fma(p, u, vec_set(0.00476161390542984f));
  p = vec_fma(p, u, vec_set(0.035142283886671066f));
  p = vec_fma(p, u, vec_set(0.3989419937133789f));
  Vec q = vec_set(1.1953997045566211e-06f);
  q = vec_fma(q, u, vec_set(7.86101445555687e-05f));
  q = vec_fma(q, u, vec_set(0.001962431939318776f));
  q = vec_fma(q, u, vec_set(0.029398668557405472f));
  q = vec_fma(q, u, vec_set(0.2547522187232971f));
  q = vec_fma(q, u, vec_set(1.0f));
  return vec_mul(x, vec_add(vec_set(0.5f), vec_div(vec_mul(c, p), q)));
}

struct Identity {
  static inline Vec apply(Vec x) { return x; }
};
// The activation of heads whose weights are W.
template <class W>
struct Gelu {
  static inline Vec apply(Vec x) { return vec_gelu_fitted(x); }
};
template <>
struct Gelu<Float32> {
  static inline Vec apply(Vec x) { return vec_gelu(x); }
};

// row <- Activation(LayerNorm(row) * gain + shift), width valid elements; the padding comes out
// zero.
template <class Activation>
void layer_norm(float* row, int64_t width, float eps, const float* gain, const float* shift) {
  const int64_t full = width / kLane * kLane, end = (width + kLane - 1) / kLane * kLane;
  float tail_mask[kLane];
  for (int i = 0; i < kLane; ++i) tail_mask[i] = full + i < width ? 1.0f : 0.0f;
  const Vec tail = vec_load(tail_mask);

  Vec total = vec_set(0.0f);
  for (int64_t i = 0; i < full; i += kLane) total = vec_add(total, vec_load(row + i));
  if (full < end) total = vec_fma(vec_load(row + full), tail, total);
  const float mean = vec_sum(total) / static_cast<float>(width);
  const Vec mean_vec = vec_set(mean);

  Vec squares = vec_set(0.0f);
  for (int64_t i = 0; i < full; i += kLane) {
    const Vec centred = vec_sub(vec_load(row + i), mean_vec);
    squares = vec_fma(centred, centred, squares);
  }
  if (full < end) {
    const Vec centred = vec_mul(vec_sub(vec_load(row + full), mean_vec), tail);
    squares = vec_fma(centred, centred, squares);
  }
  const Vec scale =
      vec_set(1.0f / __builtin_sqrtf(vec_sum(squares) / static_cast<float>(width) + eps));
  for (int64_t i = 0; i < end; i += kLane) {
    const Vec normal = vec_mul(vec_sub(vec_load(row + i), mean_vec), scale);
    vec_store(row + i, Activation::apply(vec_fma(normal, vec_load(gain + i), vec_load(shift + i))));
  }
}

inline bool all_finite(const float* x, int64_t n) {
  float poison[kLane] = {};
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane) {
    for (int j = 0; j < kLane; ++j)
      poison[j] += x[i + j] * 0.0f;  // 0 for a finite number, NaN otherwise
  }
  for (; i < n; ++i) poison[0] += x[i] * 0.0f;
  float total = 0.0f;
  for (int j = 0; j < kLane; ++j) total += poison[j];
  return total == 0.0f;
}

// Largest of x[0..n) and sum of exp(x - largest); x has room up to the next multiple of 16, which
// is overwritten.
inline void softmax_statistics(float* x, int64_t n, float* largest, float* total) {
  const int64_t end = (n + kLane - 1) / kLane * kLane;
  for (int64_t i = n; i < end; ++i) x[i] = -kLargestFinite;
  Vec top = vec_load(x);
  for (int64_t i = kLane; i < end; i += kLane) top = vec_max(top, vec_load(x + i));
  *largest = vec_largest(top);
  const Vec top_vec = vec_set(*largest);
  Vec sum = vec_set(0.0f);
  for (int64_t i = 0; i < end; i += kLane) {
    sum = vec_add(sum, vec_exp_nonpositive(vec_sub(vec_load(x + i), top_vec)));
  }
  *total = vec_sum(sum);
}

}  // namespace

// y += x w where w is stored in panels (cpu/encoders.h).
//
// The inner index is the outer loop of a panel: 64 x 64 weights stay in the first-level cache while
// every row passes over them. The additions of an output, and so its bits, are those of
// gemm_accumulate.

namespace {

// Below this many rows a half-precision weight is widened where it is used.
constexpr int64_t kWidenRows = 12;

inline void gemm_block(int64_t rows, int64_t inner, int64_t columns, const float* x,
                       int64_t x_stride, const float* w, int64_t w_stride, float* y,
                       int64_t y_stride) {
  int64_t n = 0;
  for (; n + kTileVectors * kLane <= columns; n += kTileVectors * kLane) {
    gemm_columns<Float32, kTileVectors>(rows, inner, x, x_stride, w + n, w_stride, y + n, y_stride);
  }
  if constexpr (kTileVectors > 2) {
    for (; n + 2 * kLane <= columns; n += 2 * kLane)
      gemm_columns<Float32, 2>(rows, inner, x, x_stride, w + n, w_stride, y + n, y_stride);
  }
  for (; n < columns; n += kLane)
    gemm_columns<Float32, 1>(rows, inner, x, x_stride, w + n, w_stride, y + n, y_stride);
}

// y [rows, columns] += x [rows, inner] w; `widened` has room for 64 x 64 floats.
template <class W>
void gemm_panels(int64_t rows, int64_t inner, int64_t columns, const float* x, int64_t x_stride,
                 const typename W::Storage* w, float* y, int64_t y_stride, float* widened) {
  for (int64_t n = 0; n < columns; n += kPanel) {
    const int64_t width = columns - n < kPanel ? columns - n : kPanel;
    const typename W::Storage* panel = w + n * inner;
    if constexpr (sizeof(typename W::Storage) != sizeof(float)) {
      if (rows < kWidenRows) {
        gemm_accumulate<W>(rows, inner, width, x, x_stride, panel, width, y + n, y_stride);
        continue;
      }
    }
    for (int64_t k = 0; k < inner; k += kInnerBlock) {
      const int64_t depth = inner - k < kInnerBlock ? inner - k : kInnerBlock;
      const float* block;
      if constexpr (sizeof(typename W::Storage) == sizeof(float)) {
        block = panel + k * width;
      } else {
        for (int64_t i = 0; i < depth * width; i += kLane)
          vec_store(widened + i, W::load(panel + k * width + i));
        block = widened;
      }
      gemm_block(rows, depth, width, x + k, x_stride, block, width, y + n, y_stride);
    }
  }
}

// row <- x * gain / sqrt(mean(x^2) + eps); the padding of gain holds zeros, so that of row will.
inline void rms_norm(const float* x, int64_t dim, float eps, const float* gain, float* row) {
  const int64_t end = (dim + kLane - 1) / kLane * kLane;
  Vec squares = vec_set(0.0f);
  for (int64_t i = 0; i < end; i += kLane) {
    const Vec value = vec_load(x + i);
    squares = vec_fma(value, value, squares);
  }
  const Vec scale =
      vec_set(1.0f / __builtin_sqrtf(vec_sum(squares) / static_cast<float>(dim) + eps));
  for (int64_t i = 0; i < end; i += kLane)
    vec_store(row + i, vec_mul(vec_mul(vec_load(x + i), scale), vec_load(gain + i)));
}

// n elements of `from`, whose rows are padded, rounded to nearest even to `dtype`, to element `at`.
inline void narrow_row(const float* from, int64_t n, DType dtype, void* to, int64_t at) {
  if (dtype == DType::kFloat32) {
    memcpy(static_cast<float*>(to) + at, from, n * sizeof(float));
    return;
  }
  auto* half = static_cast<uint16_t*>(to) + at;
  for (int64_t i = 0; i < n; i += kLane) {
    uint16_t narrow[kLane];
    if (dtype == DType::kBFloat16) {
      vec_store_bfloat16(narrow, vec_load(from + i));
    } else {
      vec_store_float16(narrow, vec_load(from + i));
    }
    memcpy(half + i, narrow, (n - i < kLane ? n - i : kLane) * sizeof(uint16_t));
  }
}

}  // namespace

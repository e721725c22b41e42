// y += x w where w is stored in panels (cpu/encoders.h).
//
// The inner index is the outer loop of a panel: 64 x 64 weights stay in the first-level cache while
// every row passes over them. The additions of an output, and so its bits, are those of
// gemm_accumulate, but where the processor multiplies pairs of bfloat16: there x is rounded to
// bfloat16 and its products are added two by two.

namespace {

// Below this many rows a half-precision weight is widened where it is used.
constexpr int64_t kWidenRows = 12;
constexpr int64_t kPairs = kInnerBlock / 2;

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

#if defined(__AVX512BF16__)

// Where the processor multiplies pairs of bfloat16, products of bfloat16 weights round x to
// bfloat16 and accumulate in fp32, 32 pairs at a time, in the order above. At most kChunkRows rows.
template <class W, int kRows, int kVectors>
inline void dot_tile_bfloat16(int64_t pairs, const uint32_t* x, const uint32_t* w, int64_t w_stride,
                              float* y, int64_t y_stride) {
  Vec acc[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) acc[r][v] = vec_set(0.0f);
  }
  for (int64_t k = 0; k < pairs; ++k) {
    Pairs weight[kVectors];
    for (int v = 0; v < kVectors; ++v) weight[v] = pairs_load(w + k * w_stride + v * kLane);
    for (int r = 0; r < kRows; ++r) {
      const Pairs input = pairs_set(x[r * kPairs + k]);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = vec_dot_bfloat16(input, weight[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = y + r * y_stride + v * kLane;
      vec_store(at, vec_add(vec_load(at), acc[r][v]));
    }
  }
}

template <class W, int kVectors>
inline void dot_columns_bfloat16(int64_t rows, int64_t pairs, const uint32_t* x, const uint32_t* w,
                                 int64_t w_stride, float* y, int64_t y_stride) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6)
    dot_tile_bfloat16<W, 6, kVectors>(pairs, x + m * kPairs, w, w_stride, y + m * y_stride,
                                      y_stride);
  for (; m + 2 <= rows; m += 2)
    dot_tile_bfloat16<W, 2, kVectors>(pairs, x + m * kPairs, w, w_stride, y + m * y_stride,
                                      y_stride);
  if (m < rows)
    dot_tile_bfloat16<W, 1, kVectors>(pairs, x + m * kPairs, w, w_stride, y + m * y_stride,
                                      y_stride);
}

template <class W>
void gemm_panels_bfloat16(int64_t rows, int64_t inner, int64_t columns, const float* x,
                          int64_t x_stride, const uint16_t* w, float* y, int64_t y_stride,
                          float* scratch) {
  auto* weights = reinterpret_cast<uint32_t*>(scratch);  // [kPairs, width]
  auto* inputs = weights + kPairs * kPanel;              // [rows, kPairs]
  static_assert(kPairs * (kPanel + kChunkRows) <= kPanel * kInnerBlock);
  const uint16_t zeros[kLane] = {};
  for (int64_t k = 0; k < inner; k += kInnerBlock) {
    const int64_t depth = inner - k < kInnerBlock ? inner - k : kInnerBlock;
    const int64_t pairs = (depth + 1) / 2;
    for (int64_t m = 0; m < rows; ++m) {
      uint16_t half[kInnerBlock];
      for (int64_t i = 0; i < depth; i += kLane)
        vec_store_bfloat16(half + i, vec_load(x + m * x_stride + k + i));
      if (depth % 2 != 0) half[depth] = 0;
      memcpy(inputs + m * kPairs, half, pairs * sizeof(uint32_t));
    }
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t width = columns - n < kPanel ? columns - n : kPanel;
      const uint16_t* panel = w + n * inner + k * width;
      for (int64_t p = 0; p < pairs; ++p) {
        for (int64_t i = 0; i < width; i += kLane) {
          const uint16_t* first = panel + 2 * p * width + i;
          const uint16_t* second = 2 * p + 1 < depth ? first + width : zeros;
          pairs_store(weights + p * width + i, first, second);
        }
      }
      int64_t v = 0;
      for (; v + 4 * kLane <= width; v += 4 * kLane)
        dot_columns_bfloat16<W, 4>(rows, pairs, inputs, weights + v, width, y + n + v, y_stride);
      for (; v < width; v += kLane)
        dot_columns_bfloat16<W, 1>(rows, pairs, inputs, weights + v, width, y + n + v, y_stride);
    }
  }
}

#endif

// y [rows, columns] += x [rows, inner] w; `widened` has room for 64 x 64 floats. Rows of x are
// padded with zeros to a multiple of 16.
template <class W>
void gemm_panels(int64_t rows, int64_t inner, int64_t columns, const float* x, int64_t x_stride,
                 const typename W::Storage* w, float* y, int64_t y_stride, float* widened) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<W, BFloat16>)
    return gemm_panels_bfloat16<W>(rows, inner, columns, x, x_stride, w, y, y_stride, widened);
#endif
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

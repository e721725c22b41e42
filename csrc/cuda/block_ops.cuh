// What one thread block of kThreads does together: widening loads, products, LayerNorm, ordered
// compaction.
//
// Rounding contract (batch invariance): how a sum is split among threads depends on the sizes of
// the model and of the request alone. Sums are fmaf chains and fixed trees; the files are compiled
// without contraction, so a*b+c rounds twice unless it is written fmaf.
//
// Functions named `warp_*` are called by all lanes of a warp and need no barrier. The others are
// called by all threads of the block, expect their inputs to be visible and end with a barrier.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/warp.cuh"
#include "sidmlp/views.h"

namespace sidmlp::cuda {

// The two memories of a block; turns a slot into a pointer.
struct Memory {
  char* shared;
  char* workspace;  // this block's slice

  template <class T>
  __device__ __forceinline__ T* at(const Slot& slot) const {
    return reinterpret_cast<T*>((slot.shared ? shared : workspace) + slot.offset);
  }
};

// ---- loads that widen to fp32 ----

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Four elements from an address that is aligned to four elements; the memory is not written while
// the kernel runs.
__device__ __forceinline__ float4 load_four(const float* p) {
  return __ldg(reinterpret_cast<const float4*>(p));
}
__device__ __forceinline__ float4 load_four(const __nv_bfloat16* p) {
  const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));  // bf16 is the upper half of a float
  return {__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
          __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u)};
}
__device__ __forceinline__ float4 load_four(const __half* p) {
  const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
  __half2 low, high;
  memcpy(&low, &raw.x, sizeof(low));
  memcpy(&high, &raw.y, sizeof(high));
  const float2 a = __half22float2(low), b = __half22float2(high);
  return {a.x, a.y, b.x, b.y};
}

__device__ __forceinline__ void fma_four(float x, const float4& w, float4& sum) {
  sum.x = fmaf(x, w.x, sum.x);
  sum.y = fmaf(x, w.y, sum.y);
  sum.z = fmaf(x, w.z, sum.z);
  sum.w = fmaf(x, w.w, sum.w);
}
__device__ __forceinline__ void add_four(const float4& x, float4& sum) {
  sum.x += x.x;
  sum.y += x.y;
  sum.z += x.z;
  sum.w += x.w;
}
__device__ __forceinline__ float dot_four(const float4& x, const float4& w, float sum) {
  return fmaf(x.w, w.w, fmaf(x.z, w.z, fmaf(x.y, w.y, fmaf(x.x, w.x, sum))));
}

// ---- y[r][n] = start[n] + sum_k x[r][k] w[k][n] ----

// Rows of an input-major weight matrix.
template <class W>
struct WeightRows {
  static constexpr int kUnroll = 8;  // loads in flight
  const W* base;
  int64_t stride;

  __device__ __forceinline__ float4 four(int k, int column) const {
    return load_four(base + k * stride + column);
  }
};

// What row_products computes, apart from the matrix.
struct Product {
  int rows;
  int inner;
  int columns;     // a multiple of 4
  const float* x;  // [rows, inner], rows x_stride apart
  int64_t x_stride;
  const float* start;  // [columns], or nullptr for zeros
  float* y;            // [rows, y_columns], rows y_stride apart; not x
  int64_t y_stride;
  int y_columns;  // at most columns; the rest is not stored
};

// Partial sums start from zero every kInnerBlock steps: one long running sum loses more.
constexpr int kInnerBlock = 64;
constexpr int kMinSlice = 8;  // steps that are worth a thread of their own

// A thread owns four columns; where that leaves threads idle, the inner dimension is cut into
// slices whose sums are added in order. kRows rows share each weight that is loaded. `partial` is
// scratch of kPartialVectors.
template <int kRows, class Matrix>
__device__ __forceinline__ void row_products(const Product& product, const Matrix matrix,
                                             float4* partial) {
  static_assert(kRows <= kPartialRows, "partial holds kPartialRows rows");
  constexpr int kUnroll = Matrix::kUnroll > kRows ? Matrix::kUnroll / kRows : 1;
  const int tid = static_cast<int>(threadIdx.x);
  const int inner = product.inner;
  const int num_groups = product.columns / 4;
  for (int first = 0; first < num_groups; first += kThreads) {
    const int groups = min(num_groups - first, kThreads);
    const int most_slices = kThreads / groups;
    const int steps = max((inner + most_slices - 1) / most_slices, kMinSlice);
    const int slices = max((inner + steps - 1) / steps, 1);
    const int slice = tid / groups, group = tid - slice * groups;
    const int column = 4 * (first + group);
    for (int row = 0; row < product.rows; row += kRows) {
      const int rows = min(kRows, product.rows - row);  // of this pass; the others repeat the last
      if (slice < slices) {
        const float* x[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          x[r] = product.x + (row + min(r, rows - 1)) * product.x_stride;
        float4 total[kRows] = {};
        const int end = min(inner, (slice + 1) * steps);
        for (int block = slice * steps; block < end; block += kInnerBlock) {
          const int block_end = min(end, block + kInnerBlock);
          float4 sum[kRows] = {};
#pragma unroll kUnroll
          for (int k = block; k < block_end; ++k) {
            const float4 weight = matrix.four(k, column);
#pragma unroll
            for (int r = 0; r < kRows; ++r) fma_four(x[r][k], weight, sum[r]);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) add_four(sum[r], total[r]);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) partial[(r * slices + slice) * groups + group] = total[r];
      }
      __syncthreads();
      const int width = 4 * groups;
      const float* sums = reinterpret_cast<const float*>(partial);
      for (int i = tid; i < rows * width; i += kThreads) {
        const int r = i / width, n = i - r * width;
        float sum = sums[r * slices * width + n];
        for (int s = 1; s < slices; ++s) sum += sums[(r * slices + s) * width + n];
        const int at = 4 * first + n;
        if (at >= product.y_columns) continue;
        const float start = product.start == nullptr ? 0.0f : product.start[at];
        product.y[(row + r) * product.y_stride + at] = start + sum;
      }
      __syncthreads();
    }
  }
}

// y [columns] <- start + x w for one row.
template <class Matrix>
__device__ __forceinline__ void row_product(int inner, int columns, const float* x,
                                            const Matrix& matrix, const float* start, float* y,
                                            int y_columns, float4* partial) {
  row_products<1>(Product{1, inner, columns, x, 0, start, y, 0, y_columns}, matrix, partial);
}

// ---- four dot products by one warp ----

// out[j] = x . rows[j] over `inner` elements, a multiple of 4; every lane gets all four. How the
// four are grouped never changes a bit.
template <class W>
__device__ __forceinline__ void warp_dots(const float* x, const W* const rows[4], int inner,
                                          float out[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = 0.0f;
#pragma unroll 2
  for (int i = 4 * lane_index(); i < inner; i += 4 * kWarp) {
    const float4 input = *reinterpret_cast<const float4*>(x + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j] = dot_four(input, load_four(rows[j] + i), out[j]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) out[j] = warp_sum(out[j]);
}

// ---- LayerNorm ----

struct Identity {
  static __device__ __forceinline__ float apply(float x) { return x; }
};
struct Gelu {
  static __device__ __forceinline__ float apply(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  }
};

// row <- Activation(LayerNorm(row) * gain + shift) in place, `width` valid elements; the padding
// comes out zero.
template <class Activation>
__device__ __forceinline__ void warp_layer_norm(float* row, int width, float eps, const float* gain,
                                                const float* shift) {
  const int lane = lane_index();
  __syncwarp();  // other lanes wrote the row
  float total = 0.0f;
  for (int i = lane; i < width; i += kWarp) total += row[i];
  const float mean = warp_sum(total) / static_cast<float>(width);
  float squares = 0.0f;
  for (int i = lane; i < width; i += kWarp) {
    const float centred = row[i] - mean;
    squares = fmaf(centred, centred, squares);
  }
  const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
  for (int i = lane; i < static_cast<int>(padded(width)); i += kWarp) {
    const float normal = (row[i] - mean) * scale;
    row[i] = i < width ? Activation::apply(fmaf(normal, __ldg(gain + i), __ldg(shift + i))) : 0.0f;
  }
  __syncwarp();
}

// ---- compaction ----

// list <- ascending i in [0, count) for which keep(i); returns how many. `warp_counts`: shared
// scratch of kWarps.
template <class Keep>
__device__ int compact(int count, const Keep& keep, int32_t* list, int* warp_counts) {
  const int tid = static_cast<int>(threadIdx.x), warp = warp_index(), lane = lane_index();
  int total = 0;
  for (int64_t base = 0; base < count; base += kThreads) {
    const int i = static_cast<int>(base) + tid;
    const bool kept = i < count && keep(i);
    const unsigned ballot = __ballot_sync(kAllLanes, kept);
    if (lane == 0) warp_counts[warp] = __popc(ballot);
    __syncthreads();
    int before = total;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_counts[w];
      total += warp_counts[w];
    }
    if (kept) list[before + __popc(ballot & ((1u << lane) - 1))] = i;
    __syncthreads();
  }
  return total;
}

}  // namespace sidmlp::cuda

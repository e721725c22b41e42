// Context readout of one request by one thread block, with the absorbed attention of one query
// (sidmlp_kernels/packing.py):
//
//   p = mean of valid states      q = W_p p + b_p      r_h from q (views.h)      s_ht = r_h . x_t
//   y_h = sum_t softmax(s_h)_t x_t      a from y_h      u = LN(q + a)      ctx = LN(u + W_2
//   relu(W_1 u + b_1) + b_2)
//
// States are read in place, three times (mean, scores, pooling), valid ones only, and widened in
// registers; a long history costs no memory.
#pragma once

#include "cuda/block_ops.cuh"

namespace sidmlp::cuda {

// The valid states of one request as a matrix [count, D], four columns at a time. Rows are aligned
// to four elements.
template <class S>
struct AlignedStates {
  static constexpr int kUnroll = 4;
  const S* states;       // [T, D] of the request
  const int32_t* valid;  // row -> token
  int dim;

  __device__ __forceinline__ float4 four(int row, int column) const {
    return load_four(states + static_cast<int64_t>(valid[row]) * dim + column);
  }
};

// Any alignment, D and dtype, element by element; elements past D read as zero.
struct AnyStates {
  static constexpr int kUnroll = 1;
  const StatesView& view;
  int64_t begin;  // of the request, in elements
  const int32_t* valid;
  int dim;

  __device__ __forceinline__ float one(int64_t at) const {
    switch (view.dtype) {
      case DType::kFloat32:
        return static_cast<const float*>(view.states)[at];
      case DType::kBFloat16:
        return widen(static_cast<const __nv_bfloat16*>(view.states)[at]);
      case DType::kFloat16:
        return widen(static_cast<const __half*>(view.states)[at]);
    }
    return 0.0f;
  }
  __device__ __forceinline__ float4 four(int row, int column) const {
    const int64_t at = begin + static_cast<int64_t>(valid[row]) * dim + column;
    const int left = dim - column;
    return {one(at), left > 1 ? one(at + 1) : 0.0f, left > 2 ? one(at + 2) : 0.0f,
            left > 3 ? one(at + 3) : 0.0f};
  }
};

// body(the states of the request as a matrix)
template <class Body>
__device__ __forceinline__ void with_states(const StatesView& view, int64_t request, int dim,
                                            const int32_t* valid, const Body& body) {
  const int64_t begin = request * view.tokens * dim;
  const int element = view.dtype == DType::kFloat32 ? 4 : 2;  // bytes
  if (dim % 4 != 0 || reinterpret_cast<uintptr_t>(view.states) % (4 * element) != 0)
    return body(AnyStates{view, begin, valid, dim});
  switch (view.dtype) {
    case DType::kFloat32:
      return body(AlignedStates<float>{static_cast<const float*>(view.states) + begin, valid, dim});
    case DType::kBFloat16:
      return body(AlignedStates<__nv_bfloat16>{
          static_cast<const __nv_bfloat16*>(view.states) + begin, valid, dim});
    case DType::kFloat16:
      return body(
          AlignedStates<__half>{static_cast<const __half*>(view.states) + begin, valid, dim});
  }
}

// weights[h][t] <- r_h . x_t for `count` states: a warp per state, four heads at a time.
template <class States>
__device__ __forceinline__ void attention_scores(const States states, int count, int dim,
                                                 int num_heads, const float* head_rows,
                                                 int64_t head_stride, float* weights,
                                                 int64_t weights_stride) {
  const int lane = lane_index();
  for (int t = warp_index(); t < count; t += kWarps) {
    for (int head = 0; head < num_heads; head += 4) {
      float score[4] = {};
#pragma unroll 1  // more needs more registers than two blocks a multiprocessor leave
      for (int i = 4 * lane; i < dim; i += 4 * kWarp) {
        const float4 state = states.four(t, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* row = head_rows + min(head + j, num_heads - 1) * head_stride + i;
          score[j] = dot_four(state, *reinterpret_cast<const float4*>(row), score[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float sum = warp_sum(score[j]);
        if (lane == 0 && head + j < num_heads) weights[(head + j) * weights_stride + t] = sum;
      }
    }
  }
  __syncthreads();
}

// weights[h] <- softmax(weights[h]) over `count` states: a warp per head.
__device__ inline void attention_softmax(int count, int num_heads, float* weights, int64_t stride) {
  const int lane = lane_index();
  for (int head = warp_index(); head < num_heads; head += kWarps) {
    float* row = weights + head * stride;
    float largest = -kLargestFinite;
    for (int t = lane; t < count; t += kWarp) largest = fmaxf(largest, row[t]);
    largest = warp_max(largest);
    float total = 0.0f;
    for (int t = lane; t < count; t += kWarp) {
      row[t] = expf(row[t] - largest);
      total += row[t];
    }
    const float scale = 1.0f / warp_sum(total);
    for (int t = lane; t < count; t += kWarp) row[t] *= scale;
  }
  __syncthreads();
}

// context [Dp] <- readout of one request. `warp_counts`: shared scratch of kWarps.
template <class W>
__device__ void context_readout(const ReadoutView& view, const StatesView& states, int64_t request,
                                const Memory& memory, const ReadoutLayout& layout, float4* partial,
                                int* warp_counts, float* context) {
  const int tid = static_cast<int>(threadIdx.x);
  const int dim = view.dim, heads = view.num_heads, head_dim = view.head_dim;
  const int dim_pad = static_cast<int>(padded(dim)), head_pad = static_cast<int>(padded(head_dim));
  const int ffn_pad = static_cast<int>(padded(view.ffn_dim)), state_columns = (dim + 3) / 4 * 4;
  const int64_t token_pad = padded(states.tokens);
  const float* query_bias = view.vectors;
  const float* norm1_gain = view.vectors + dim_pad;
  const float* norm1_shift = view.vectors + 2 * dim_pad;
  const float* ffn_out_bias = view.vectors + 3 * dim_pad;
  const float* norm2_gain = view.vectors + 4 * dim_pad;
  const float* norm2_shift = view.vectors + 5 * dim_pad;
  const bool factored = view.score_in != nullptr;

  auto* valid = memory.at<int32_t>(layout.valid);
  auto* weights = memory.at<float>(layout.weights);
  auto* mean = memory.at<float>(layout.mean);
  auto* query = memory.at<float>(layout.query);
  auto* sum = memory.at<float>(layout.sum);
  auto* folded = memory.at<float>(layout.folded);
  auto* head_rows = memory.at<float>(layout.head_rows);
  auto* hidden = memory.at<float>(layout.hidden);

  const uint8_t* mask = states.mask + request * states.tokens;
  const int count = compact(states.tokens, [=](int t) { return mask[t] != 0; }, valid, warp_counts);
  auto over_states = [&](const auto& body) { with_states(states, request, dim, valid, body); };
  auto weight_rows = [](const void* matrix, int64_t offset, int64_t stride) {
    return WeightRows<W>{static_cast<const W*>(matrix) + offset, stride};
  };

  // p and q
  for (int t = tid; t < count; t += kThreads) weights[t] = 1.0f;
  __syncthreads();
  over_states([&](const auto& rows) {
    row_product(count, state_columns, weights, rows, nullptr, mean, dim, partial);
  });
  const float scale = count > 0 ? 1.0f / static_cast<float>(count) : 0.0f;
  for (int i = tid; i < dim; i += kThreads) mean[i] *= scale;
  __syncthreads();
  row_product(dim, dim_pad, mean, weight_rows(view.query_weight, 0, dim_pad), query_bias, query,
              dim_pad, partial);

  // r_h
  if (factored) {
    const int width = heads * head_pad;
    row_product(dim, width, query, weight_rows(view.score_in, 0, width), nullptr, folded, width,
                partial);
    for (int64_t h = 0; h < heads; ++h) {
      row_product(head_dim, dim_pad, folded + h * head_pad,
                  weight_rows(view.score_out, h * head_dim * dim_pad, dim_pad), nullptr,
                  head_rows + h * dim_pad, dim_pad, partial);
    }
  } else {
    const int width = heads * dim_pad;
    row_product(dim, width, query, weight_rows(view.score_out, 0, width), nullptr, head_rows, width,
                partial);
  }

  // y_h [heads, D] takes the place of r_h [heads, Dp]; zero without a valid state
  over_states([&](const auto& rows) {
    attention_scores(rows, count, dim, heads, head_rows, dim_pad, weights, token_pad);
  });
  attention_softmax(count, heads, weights, token_pad);
  over_states([&](const auto& rows) {
    row_products<kPartialRows>(
        Product{heads, count, state_columns, weights, token_pad, nullptr, head_rows, dim, dim},
        rows, partial);
  });

  // q + a and u
  if (factored) {
    const int width = heads * head_pad;
    for (int64_t h = 0; h < heads; ++h) {
      row_product(dim, head_pad, head_rows + h * dim,
                  weight_rows(view.value_in, h * head_pad, width), nullptr, folded + h * head_dim,
                  head_dim, partial);
    }
    row_product(heads * head_dim, dim_pad, folded, weight_rows(view.value_out, 0, dim_pad), query,
                sum, dim_pad, partial);
  } else {
    row_product(heads * dim, dim_pad, head_rows, weight_rows(view.value_in, 0, dim_pad), query, sum,
                dim_pad, partial);
  }
  if (warp_index() == 0)
    warp_layer_norm<Identity>(sum, dim, view.layer_norm_eps, norm1_gain, norm1_shift);
  __syncthreads();

  // FFN; fmaxf would drop a NaN, which must reach the context
  row_product(dim, ffn_pad, sum, weight_rows(view.ffn_in, 0, ffn_pad), view.ffn_in_bias, hidden,
              ffn_pad, partial);
  for (int i = tid; i < ffn_pad; i += kThreads) hidden[i] = hidden[i] < 0.0f ? 0.0f : hidden[i];
  for (int i = tid; i < dim_pad; i += kThreads) query[i] = sum[i] + ffn_out_bias[i];
  __syncthreads();
  row_product(view.ffn_dim, dim_pad, hidden, weight_rows(view.ffn_out, 0, dim_pad), query, context,
              dim_pad, partial);
  if (warp_index() == 0)
    warp_layer_norm<Identity>(context, dim, view.layer_norm_eps, norm2_gain, norm2_shift);
  __syncthreads();
}

}  // namespace sidmlp::cuda

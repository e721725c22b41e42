// The heads: h = GELU(LN(W_1 [ctx; e(c_1); ..] + b_1)), further blocks h <- GELU(LN(W h + b)),
// logits = W_2 h + b_2. The first layer is a context part, computed once per request for every
// head, plus one gathered row of the prefix tables per earlier code.
#pragma once

#include "cuda/block_ops.cuh"

namespace sidmlp::cuda {

// first [num_levels * Hp] <- context part of the first layers of `num_levels` heads from index
// `level` on.
template <class W>
__device__ void context_part(const HeadsView& heads, int level, int num_levels,
                             const float* context, float4* partial, float* first) {
  const int hidden_pad = static_cast<int>(padded(heads.hidden_dim));
  const float* bias = heads.context_bias + level * hidden_pad;
  const W* weight = static_cast<const W*>(heads.context_weight) + level * hidden_pad;
  const int columns = num_levels * hidden_pad;
  row_product(heads.dim, columns, context,
              WeightRows<W>{weight, static_cast<int64_t>(heads.num_levels) * hidden_pad}, bias,
              first, columns, partial);
}

// hidden [Hp] <- GELU(LN(first + sum_j P_{l,j}[c_j])) for the prefix codes[0..level), by one warp.
template <class W, class Code>
__device__ void warp_first_layer(const HeadsView& heads, int level, const float* first,
                                 const Code* codes, float* hidden) {
  const HeadView& head = heads.heads[level];
  const int64_t hidden_pad = padded(heads.hidden_dim);
  for (int64_t i = 4 * lane_index(); i < hidden_pad; i += 4 * kWarp) {
    float4 z = *reinterpret_cast<const float4*>(first + i);
    int64_t offset = 0;
    for (int j = 0; j < level; ++j) {
      const W* table = static_cast<const W*>(head.prefix_table);
      add_four(load_four(table + (offset + codes[j]) * hidden_pad + i), z);
      offset += heads.heads[j].num_codes;
    }
    *reinterpret_cast<float4*>(hidden + i) = z;
  }
  warp_layer_norm<Gelu>(hidden, heads.hidden_dim, heads.layer_norm_eps, head.vectors,
                        head.vectors + hidden_pad);
}

// Blocks 1.. of a head on `rows` rows [.., Hp]; returns where the result lies, hidden or next.
// Called by all threads after a barrier; ends with one.
template <class W>
__device__ float* further_blocks(const HeadsView& heads, const HeadView& head, int rows,
                                 float* hidden, float* next, float4* partial) {
  const int hidden_pad = static_cast<int>(padded(heads.hidden_dim));
  const W* weight = static_cast<const W*>(head.block_weight);
  for (int64_t block = 1; block < heads.num_blocks; ++block) {
    const float* bias = head.vectors + (3 * block - 1) * hidden_pad;
    const WeightRows<W> matrix{weight + (block - 1) * heads.hidden_dim * hidden_pad, hidden_pad};
    row_products<kPartialRows>(Product{rows, heads.hidden_dim, hidden_pad, hidden, hidden_pad, bias,
                                       next, hidden_pad, hidden_pad},
                               matrix, partial);
    for (int row = warp_index(); row < rows; row += kWarps) {
      warp_layer_norm<Gelu>(next + row * hidden_pad, heads.hidden_dim, heads.layer_norm_eps,
                            bias + hidden_pad, bias + 2 * hidden_pad);
    }
    __syncthreads();
    float* swap = hidden;
    hidden = next;
    next = swap;
  }
  return hidden;
}

// out[i] <- logit of code code_of(first + i), i < min(4, count - first), for one
// hidden row, by one warp.
template <class W, class CodeOf>
__device__ __forceinline__ void warp_logits(const HeadsView& heads, const HeadView& head,
                                            const float* hidden, int first, int count,
                                            const CodeOf& code_of, float* out) {
  const int64_t hidden_pad = padded(heads.hidden_dim);
  const W* weight = static_cast<const W*>(head.out_weight);
  const W* rows[4];
  int codes[4];
  float dots[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    codes[j] = code_of(min(first + j, count - 1));
    rows[j] = weight + codes[j] * hidden_pad;
  }
  warp_dots(hidden, rows, static_cast<int>(hidden_pad), dots);
  if (lane_index() != 0) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (first + j < count) out[j] = dots[j] + __ldg(head.out_bias + codes[j]);
  }
}

}  // namespace sidmlp::cuda

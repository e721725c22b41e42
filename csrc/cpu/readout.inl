// Context readout: encoder states -> one context vector per request, with the absorbed attention of
// one query.
//
//   p = mean of valid states      q = W_p p + b_p      r_h from q (views.h)      s_ht = r_h . x_t
//   y_h = sum_t softmax(s_h)_t x_t      a from y_h      u = LN(q + a)      ctx = LN(u + W_2
//   relu(W_1 u + b_1) + b_2)
//
// A block of requests shares every weight that is read; the part that touches states runs request
// by request, on a compact fp32 copy of the valid states, so masked states are never read.

namespace {

template <class S>
inline void widen_row(const typename S::Storage* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane) vec_store(to + i, S::load(from + i));
  if (i == n) return;
  typename S::Storage rest[kLane] = {};
  for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
  vec_store(to + i, S::load(rest));
}

// Copies the valid states of request b to compact rows [.., stride] and returns how many there are.
inline int64_t gather_states(const StatesView& view, int64_t b, int64_t dim, float* rows,
                             int64_t stride) {
  const uint8_t* mask = view.mask + b * view.tokens;
  int64_t count = 0;
  for (int64_t t = 0; t < view.tokens; ++t) {
    if (!mask[t]) continue;
    const int64_t at = (b * view.tokens + t) * dim;
    float* to = rows + count++ * stride;
    switch (view.dtype) {
      case DType::kFloat32:
        widen_row<Float32>(static_cast<const float*>(view.states) + at, dim, to);
        break;
      case DType::kBFloat16:
        widen_row<BFloat16>(static_cast<const uint16_t*>(view.states) + at, dim, to);
        break;
      case DType::kFloat16:
        widen_row<Float16>(static_cast<const uint16_t*>(view.states) + at, dim, to);
        break;
    }
  }
  return count;
}

inline void mean_row(const float* rows, int64_t stride, int64_t count, float* mean) {
  const Vec scale = vec_set(count > 0 ? 1.0f / static_cast<float>(count) : 0.0f);
  for (int64_t i = 0; i < stride; i += kLane) {
    Vec total = vec_set(0.0f);
    for (int64_t t = 0; t < count; ++t) total = vec_add(total, vec_load(rows + t * stride + i));
    vec_store(mean + i, vec_mul(total, scale));
  }
}

// pooled [heads, Dp] <- sum_t softmax_t(r_h . x_t) x_t over `count` compact states; zero where
// there is none.
inline void attend(const ReadoutView& view, const float* states, int64_t count,
                   const float* query_rows, float* weights, int64_t weights_stride, float* pooled) {
  const int64_t dim_pad = padded(view.dim);
  if (count == 0) return zero_rows(pooled, dim_pad, view.num_heads, dim_pad);
  dot_matrix<Float32>(view.num_heads, dim_pad, count, query_rows, dim_pad, states, dim_pad, weights,
                      weights_stride);
  for (int h = 0; h < view.num_heads; ++h) {
    float* row = weights + h * weights_stride;
    float largest, total;
    softmax_statistics(row, count, &largest, &total);
    const Vec top = vec_set(largest), scale = vec_set(1.0f / total);
    for (int64_t t = 0; t < count; t += kLane) {
      vec_store(row + t, vec_mul(vec_exp_nonpositive(vec_sub(vec_load(row + t), top)), scale));
    }
  }
  zero_rows(pooled, dim_pad, view.num_heads, dim_pad);
  gemm_accumulate<Float32>(view.num_heads, count, dim_pad, weights, weights_stride, states, dim_pad,
                           pooled, dim_pad);
}

template <class W>
void readout_block(const ReadoutView& view, const StatesView& states, int64_t begin, int64_t end,
                   float* context, int64_t context_stride, Arena& arena) {
  using Storage = typename W::Storage;
  const int64_t rows = end - begin, heads = view.num_heads;
  const int64_t dim_pad = padded(view.dim), head_pad = padded(view.head_dim),
                ffn_pad = padded(view.ffn_dim);
  const int64_t token_pad = padded(states.tokens);
  const auto* query_weight = static_cast<const Storage*>(view.query_weight);
  const auto* score_in = static_cast<const Storage*>(view.score_in);
  const auto* score_out = static_cast<const Storage*>(view.score_out);
  const auto* value_in = static_cast<const Storage*>(view.value_in);
  const auto* value_out = static_cast<const Storage*>(view.value_out);
  const auto* ffn_in = static_cast<const Storage*>(view.ffn_in);
  const auto* ffn_out = static_cast<const Storage*>(view.ffn_out);
  const float* query_bias = view.vectors;
  const float* norm1_gain = view.vectors + dim_pad;
  const float* norm1_shift = view.vectors + 2 * dim_pad;
  const float* ffn_out_bias = view.vectors + 3 * dim_pad;
  const float* norm2_gain = view.vectors + 4 * dim_pad;
  const float* norm2_shift = view.vectors + 5 * dim_pad;
  const bool factored = score_in != nullptr;

  auto take = [&](int64_t n) { return static_cast<float*>(arena.take(n * sizeof(float))); };
  float* compact = take(states.tokens * dim_pad);  // [T, Dp] of one request
  float* weights = take(heads * token_pad);        // [heads, Tp] of one request
  float* mean = take(kMaxBlock * dim_pad);         // [rows, Dp]
  float* query = take(kMaxBlock * dim_pad);        // [rows, Dp]
  float* folded =
      take(kMaxBlock * heads * head_pad);  // [rows, heads, dp]: W_q,h q, later W_v,h y_h
  float* query_rows = take(kMaxBlock * heads * dim_pad);  // [rows, heads, Dp]: r_h, later y_h
  float* hidden = take(kMaxBlock * ffn_pad);              // [rows, Fp]
  float* sum = take(kMaxBlock * dim_pad);                 // [rows, Dp]: q + a, then u

  for (int64_t m = 0; m < rows; ++m) {
    const int64_t count = gather_states(states, begin + m, view.dim, compact, dim_pad);
    mean_row(compact, dim_pad, count, mean + m * dim_pad);
  }
  fill_rows(query, dim_pad, rows, query_bias, dim_pad);
  gemm_accumulate<W>(rows, view.dim, dim_pad, mean, dim_pad, query_weight, dim_pad, query, dim_pad);

  const int64_t query_stride = heads * dim_pad, folded_stride = heads * head_pad;
  zero_rows(query_rows, query_stride, rows, query_stride);
  if (factored) {
    zero_rows(folded, folded_stride, rows, folded_stride);
    gemm_accumulate<W>(rows, view.dim, folded_stride, query, dim_pad, score_in, folded_stride,
                       folded, folded_stride);
    for (int64_t h = 0; h < heads; ++h) {
      gemm_accumulate<W>(rows, view.head_dim, dim_pad, folded + h * head_pad, folded_stride,
                         score_out + h * view.head_dim * dim_pad, dim_pad, query_rows + h * dim_pad,
                         query_stride);
    }
  } else {
    gemm_accumulate<W>(rows, view.dim, query_stride, query, dim_pad, score_out, query_stride,
                       query_rows, query_stride);
  }

  for (int64_t m = 0; m < rows; ++m) {
    const int64_t count = gather_states(states, begin + m, view.dim, compact, dim_pad);
    float* own = query_rows + m * query_stride;
    attend(view, compact, count, own, weights, token_pad, own);
  }

  memcpy(sum, query, rows * dim_pad * sizeof(float));
  if (factored) {
    zero_rows(folded, folded_stride, rows, folded_stride);
    for (int64_t h = 0; h < heads; ++h) {
      gemm_accumulate<W>(rows, view.dim, head_pad, query_rows + h * dim_pad, query_stride,
                         value_in + h * head_pad, folded_stride, folded + h * head_pad,
                         folded_stride);
    }
    for (int64_t h = 0; h < heads; ++h) {
      gemm_accumulate<W>(rows, view.head_dim, dim_pad, folded + h * head_pad, folded_stride,
                         value_out + h * view.head_dim * dim_pad, dim_pad, sum, dim_pad);
    }
  } else {
    for (int64_t h = 0; h < heads; ++h) {
      gemm_accumulate<W>(rows, view.dim, dim_pad, query_rows + h * dim_pad, query_stride,
                         value_in + h * view.dim * dim_pad, dim_pad, sum, dim_pad);
    }
  }
  for (int64_t m = 0; m < rows; ++m) {
    layer_norm<Identity>(sum + m * dim_pad, view.dim, view.layer_norm_eps, norm1_gain, norm1_shift);
  }

  fill_rows(hidden, ffn_pad, rows, view.ffn_in_bias, ffn_pad);
  gemm_accumulate<W>(rows, view.dim, ffn_pad, sum, dim_pad, ffn_in, ffn_pad, hidden, ffn_pad);
  const Vec zero = vec_set(0.0f);
  for (int64_t i = 0; i < rows * ffn_pad; i += kLane)
    vec_store(hidden + i, vec_max(zero, vec_load(hidden + i)));
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < dim_pad; i += kLane) {
      vec_store(query + m * dim_pad + i,
                vec_add(vec_load(sum + m * dim_pad + i), vec_load(ffn_out_bias + i)));
    }
  }
  gemm_accumulate<W>(rows, view.ffn_dim, dim_pad, hidden, ffn_pad, ffn_out, dim_pad, query,
                     dim_pad);
  for (int64_t m = 0; m < rows; ++m) {
    layer_norm<Identity>(query + m * dim_pad, view.dim, view.layer_norm_eps, norm2_gain,
                         norm2_shift);
    memcpy(context + m * context_stride, query + m * dim_pad, view.dim * sizeof(float));
  }
}

void context_readout(const ReadoutView& view, const StatesView& states, int64_t begin, int64_t end,
                     float* context, int64_t context_stride, Arena& arena) {
  switch (view.dtype) {
    case DType::kFloat32:
      return readout_block<Float32>(view, states, begin, end, context, context_stride, arena);
    case DType::kBFloat16:
      return readout_block<BFloat16>(view, states, begin, end, context, context_stride, arena);
    case DType::kFloat16:
      return readout_block<Float16>(view, states, begin, end, context, context_stride, arena);
  }
}

}  // namespace

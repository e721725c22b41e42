// T5's encoder over rows of valid tokens.
//
//   x = embed(ids)
//   per layer:  x <- x + O softmax(Q n K n^T + bias) V n,   n = RMSNorm(x)
//               x <- x + FFN(n),                            n = RMSNorm(x)
//   states = RMSNorm(x)
//
// Stage 0 embeds and forms the queries, keys and values of the first layer; stage l does layer l
// from its attention on and forms the queries, keys and values of the next, or the states. A row
// needs other rows' keys and values only, so one barrier a layer is enough; keys are kept
// transposed, so that scores are a product over contiguous columns. Within a stage rows pass in
// chunks whose hidden activations fit the second-level cache.

namespace {

// GELU as T5 v1.1 fits it: x / (1 + exp(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec vec_gelu_tanh(Vec x) {
  const Vec cube = vec_mul(vec_mul(x, x), x);
  const Vec u = vec_mul(vec_set(0.7978845608028654f), vec_fma(vec_set(0.044715f), cube, x));
  const Vec e = vec_exp_nonpositive(vec_mul(vec_set(-2.0f), vec_abs(u)));
  const Vec share = vec_div(vec_set(1.0f), vec_add(vec_set(1.0f), e));
  return vec_mul(x, vec_select_nonnegative(u, share, vec_mul(e, share)));
}

// hidden <- act(hidden), or act(hidden) * up; n is a multiple of 16.
inline void feed_forward_activation(Activation kind, float* hidden, const float* up, int64_t n) {
  const Vec zero = vec_set(0.0f);
  for (int64_t i = 0; i < n; i += kLane) {
    const Vec x = vec_load(hidden + i);
    switch (kind) {
      case Activation::kRelu:
        vec_store(hidden + i, vec_max(zero, x));
        break;
      case Activation::kGelu:
        vec_store(hidden + i, vec_gelu(x));
        break;
      case Activation::kGatedRelu:
        vec_store(hidden + i, vec_mul(vec_max(zero, x), vec_load(up + i)));
        break;
      case Activation::kGatedGelu:
        vec_store(hidden + i, vec_mul(vec_gelu_tanh(x), vec_load(up + i)));
        break;
    }
  }
}

// row [n] <- exp(row - its largest), padding zero; returns the sum. A row that is not finite
// becomes NaN throughout: vec_exp_nonpositive alone would hide it.
inline float exponentials(float* row, int64_t n) {
  const int64_t end = padded(n);
  for (int64_t i = n; i < end; ++i) row[i] = -kLargestFinite;
  Vec top = vec_load(row);
  for (int64_t i = kLane; i < end; i += kLane) top = vec_max(top, vec_load(row + i));
  const Vec largest = vec_set(vec_largest(top)), zero = vec_set(0.0f);
  Vec sum = zero;
  for (int64_t i = 0; i < end; i += kLane) {
    const Vec below = vec_sub(vec_load(row + i), largest);
    const Vec e = vec_fma(below, zero, vec_exp_nonpositive(below));
    vec_store(row + i, e);
    sum = vec_add(sum, e);
  }
  return vec_sum(sum);
}

template <class W>
struct T5Stage {
  using Storage = typename W::Storage;

  const T5Panels& view;
  const TokenRows& tokens;
  const T5Work& work;
  void* states;
  float *normed, *keys, *mixed, *scores, *hidden, *up, *widened;  // scratch of a chunk
  int64_t dim_pad, head_pad, width, ffn_pad;

  T5Stage(const T5Panels& v, const TokenRows& t, const T5Work& w, void* out, Arena& arena)
      : view(v), tokens(t), work(w), states(out) {
    dim_pad = padded(v.dim), head_pad = padded(v.head_dim), ffn_pad = padded(v.ffn_dim);
    width = v.num_heads * head_pad;
    auto take = [&](int64_t n) { return static_cast<float*>(arena.take(n * sizeof(float))); };
    normed = take(kChunkRows * dim_pad);
    keys = take(kChunkRows * width);
    mixed = take(kChunkRows * width);
    scores = take(kChunkRows * padded(t.longest));
    hidden = take(kChunkRows * ffn_pad);
    up = take(v.layers[0].ffn_up != nullptr ? kChunkRows * ffn_pad : 0);
    widened = take(kPanel * kInnerBlock);
  }

  static const Storage* panels(const void* w) { return static_cast<const Storage*>(w); }

  void product(int64_t rows, int64_t inner, int64_t columns, const float* x, int64_t x_stride,
               const void* w, float* y, int64_t y_stride) const {
    gemm_panels<W>(rows, inner, columns, x, x_stride, panels(w), y, y_stride, widened);
  }

  void norm(const float* gain, int64_t begin, int64_t rows) const {
    for (int64_t m = 0; m < rows; ++m)
      rms_norm(work.residual + (begin + m) * dim_pad, view.dim, view.eps, gain,
               normed + m * dim_pad);
  }

  void embed(int64_t begin, int64_t rows) const {
    for (int64_t m = begin; m < begin + rows; ++m) {
      const Storage* row = panels(view.embedding) + tokens.id[m] * dim_pad;
      for (int64_t i = 0; i < dim_pad; i += kLane)
        vec_store(work.residual + m * dim_pad + i, W::load(row + i));
    }
  }

  // The request that row m belongs to ends the run of rows that it returns, or `end` does.
  int64_t run_end(int64_t m, int64_t end) const {
    const int64_t last = tokens.requests[tokens.request[m]].end;
    return last < end ? last : end;
  }

  void project(int layer, int64_t begin, int64_t rows) const {
    const T5LayerPanels& w = view.layers[layer];
    norm(view.norms + 2 * layer * dim_pad, begin, rows);
    float* query = work.query + begin * width;
    float* value = work.value[layer % 2] + begin * width;
    zero_rows(query, width, rows, width);
    product(rows, view.dim, width, normed, dim_pad, w.query, query, width);
    zero_rows(value, width, rows, width);
    product(rows, view.dim, width, normed, dim_pad, w.value, value, width);
    zero_rows(keys, width, rows, width);
    product(rows, view.dim, width, normed, dim_pad, w.key, keys, width);
    for (int64_t m = begin; m < begin + rows;) {
      const int64_t stop = run_end(m, begin + rows);
      transpose(layer, m, stop, keys + (m - begin) * width);
      m = stop;
    }
  }

  // Keys of rows [begin, end) of one request into its columns; the padding after its last row is
  // zero.
  void transpose(int layer, int64_t begin, int64_t end, const float* from) const {
    const RequestRows& request = tokens.requests[tokens.request[begin]];
    const int64_t stride = padded(request.end - request.begin), first = begin - request.begin;
    const int64_t rows = end - begin;
    const int64_t columns = end == request.end ? stride - first : rows;
    float* to = work.key[layer % 2] + request.padded_begin * width + first;
    for (int64_t a = 0; a < width; ++a) {
      float* row = to + a * stride;
      for (int64_t m = 0; m < rows; ++m) row[m] = from[m * width + a];
      for (int64_t m = rows; m < columns; ++m) row[m] = 0.0f;
    }
  }

  // mixed <- attention of rows [begin, end), which are of one request.
  void attend(int layer, int64_t begin, int64_t end, float* out) const {
    const RequestRows& request = tokens.requests[tokens.request[begin]];
    const int64_t count = request.end - request.begin, stride = padded(count), rows = end - begin;
    const int32_t* position = tokens.position + request.begin;
    const bool consecutive = position[count - 1] - position[0] == count - 1;
    const int64_t span = 2 * tokens.tokens - 1, centre = tokens.tokens - 1;
    const float* key = work.key[layer % 2] + request.padded_begin * width;
    const float* value = work.value[layer % 2] + request.begin * width;
    for (int64_t h = 0; h < view.num_heads; ++h) {
      for (int64_t m = 0; m < rows; ++m) {
        const float* bias = work.bias + h * span + centre - tokens.position[begin + m];
        float* row = scores + m * stride;
        if (consecutive) {
          memcpy(row, bias + position[0], count * sizeof(float));
        } else {
          for (int64_t j = 0; j < count; ++j) row[j] = bias[position[j]];
        }
        for (int64_t j = count; j < stride; ++j) row[j] = 0.0f;
      }
      gemm_block(rows, view.head_dim, stride, work.query + begin * width + h * head_pad, width,
                 key + h * head_pad * stride, stride, scores, stride);
      float* head = out + h * head_pad;
      zero_rows(head, width, rows, head_pad);
      float total[kChunkRows];
      for (int64_t m = 0; m < rows; ++m) total[m] = exponentials(scores + m * stride, count);
      gemm_accumulate<Float32>(rows, count, head_pad, scores, stride, value + h * head_pad, width,
                               head, width);
      for (int64_t m = 0; m < rows; ++m) {
        const Vec scale = vec_set(1.0f / total[m]);
        for (int64_t i = 0; i < head_pad; i += kLane)
          vec_store(head + m * width + i, vec_mul(vec_load(head + m * width + i), scale));
      }
    }
  }

  void layer(int layer, int64_t begin, int64_t rows) const {
    const T5LayerPanels& w = view.layers[layer];
    float* x = work.residual + begin * dim_pad;
    for (int64_t m = begin; m < begin + rows;) {
      const int64_t stop = run_end(m, begin + rows);
      attend(layer, m, stop, mixed + (m - begin) * width);
      m = stop;
    }
    product(rows, width, dim_pad, mixed, width, w.output, x, dim_pad);
    norm(view.norms + (2 * layer + 1) * dim_pad, begin, rows);
    zero_rows(hidden, ffn_pad, rows, ffn_pad);
    product(rows, view.dim, ffn_pad, normed, dim_pad, w.ffn_in, hidden, ffn_pad);
    if (w.ffn_up != nullptr) {
      zero_rows(up, ffn_pad, rows, ffn_pad);
      product(rows, view.dim, ffn_pad, normed, dim_pad, w.ffn_up, up, ffn_pad);
    }
    feed_forward_activation(view.activation, hidden, up, rows * ffn_pad);
    product(rows, view.ffn_dim, dim_pad, hidden, ffn_pad, w.ffn_out, x, dim_pad);
  }

  void finish(int64_t begin, int64_t rows) const {
    norm(view.norms + 2 * view.num_layers * dim_pad, begin, rows);
    for (int64_t m = 0; m < rows; ++m)
      narrow_row(normed + m * dim_pad, view.dim, view.dtype, states,
                 tokens.source[begin + m] * view.dim);
  }

  void run(int stage, int64_t begin, int64_t end) const {
    for (int64_t m = begin; m < end; m += kChunkRows) {
      const int64_t rows = end - m < kChunkRows ? end - m : kChunkRows;
      if (stage == 0) {
        embed(m, rows);
      } else {
        layer(stage - 1, m, rows);
      }
      if (stage < view.num_layers) {
        project(stage, m, rows);
      } else {
        finish(m, rows);
      }
    }
  }
};

void encode_t5(const T5Panels& view, const TokenRows& tokens, const T5Work& work, int stage,
               int64_t begin, int64_t end, void* states, Arena& arena) {
  switch (view.dtype) {
    case DType::kFloat32:
      return T5Stage<Float32>(view, tokens, work, states, arena).run(stage, begin, end);
    case DType::kBFloat16:
      return T5Stage<BFloat16>(view, tokens, work, states, arena).run(stage, begin, end);
    case DType::kFloat16:
      return T5Stage<Float16>(view, tokens, work, states, arena).run(stage, begin, end);
  }
}

}  // namespace

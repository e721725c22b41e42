// SID-MLP++'s encoder over rows of valid tokens.
//
//   x = embedding + position
//   per layer:  m = mean of the request's x,  x <- x + MLP_r([x; m]),  r the token's role,
//               MLP = Linear - LayerNorm - GELU - Linear
//   states = LayerNorm(x)
//
// Stage 0 embeds; stage l does layer l, and the last one the states. A layer reads one buffer of x
// and writes the other, since means need rows that other threads compute. A token passes through
// the MLP of its own role only: rows of a role are gathered into chunks. The half of the first
// Linear that reads the mean is computed once for each request in a chunk.

namespace {

template <class W>
struct MlpStage {
  using Storage = typename W::Storage;

  const MlpPanels& view;
  const TokenRows& tokens;
  const MlpWork& work;
  void* states;
  int64_t dim_pad, hidden_pad;
  float *means, *chunk, *out, *mean_chunk, *mean_hidden, *hidden, *widened;  // scratch
  int64_t* row_of;                                                           // [kChunkRows]

  MlpStage(const MlpPanels& v, const TokenRows& t, const MlpWork& w, void* to, Arena& arena)
      : view(v), tokens(t), work(w), states(to) {
    dim_pad = padded(v.dim), hidden_pad = padded(v.hidden_dim);
    auto take = [&](int64_t n) { return static_cast<float*>(arena.take(n * sizeof(float))); };
    means = take(t.num_requests * dim_pad);
    chunk = take(kChunkRows * dim_pad);
    out = take(kChunkRows * dim_pad);
    mean_chunk = take(kChunkRows * dim_pad);
    mean_hidden = take(kChunkRows * hidden_pad);
    hidden = take(kChunkRows * hidden_pad);
    widened = take(kPanel * kInnerBlock);
    row_of = static_cast<int64_t*>(arena.take(kChunkRows * sizeof(int64_t)));
  }

  void embed(int64_t begin, int64_t end) const {
    for (int64_t m = begin; m < end; ++m) {
      const Storage* token = static_cast<const Storage*>(view.embedding) + tokens.id[m] * dim_pad;
      const Storage* place =
          static_cast<const Storage*>(view.positions) + tokens.position[m] * dim_pad;
      for (int64_t i = 0; i < dim_pad; i += kLane)
        vec_store(work.x[0] + m * dim_pad + i, vec_add(W::load(token + i), W::load(place + i)));
    }
  }

  // One chunk of rows of one role, row_of[0..rows).
  void mlp(int layer, int role, int64_t rows, const float* from, float* to) const {
    const MlpLayerPanels& w = view.layers[layer];
    const float* vectors = w.vectors + role * 3 * hidden_pad;
    const auto* token_half = static_cast<const Storage*>(w.token) + role * view.dim * hidden_pad;
    const auto* mean_half = static_cast<const Storage*>(w.mean) + role * view.dim * hidden_pad;
    const auto* second = static_cast<const Storage*>(w.out) + role * view.hidden_dim * dim_pad;

    int64_t requests = 0;
    for (int64_t m = 0; m < rows; ++m) {
      const int32_t request = tokens.request[row_of[m]];
      if (m == 0 || request != tokens.request[row_of[m - 1]]) {
        memcpy(mean_chunk + requests * dim_pad, means + request * dim_pad, dim_pad * sizeof(float));
        ++requests;
      }
      memcpy(chunk + m * dim_pad, from + row_of[m] * dim_pad, dim_pad * sizeof(float));
    }
    fill_rows(mean_hidden, hidden_pad, requests, vectors, hidden_pad);
    gemm_panels<W>(requests, view.dim, hidden_pad, mean_chunk, dim_pad, mean_half, mean_hidden,
                   hidden_pad, widened);
    int64_t slot = -1;
    for (int64_t m = 0; m < rows; ++m) {
      if (m == 0 || tokens.request[row_of[m]] != tokens.request[row_of[m - 1]]) ++slot;
      memcpy(hidden + m * hidden_pad, mean_hidden + slot * hidden_pad, hidden_pad * sizeof(float));
    }
    gemm_panels<W>(rows, view.dim, hidden_pad, chunk, dim_pad, token_half, hidden, hidden_pad,
                   widened);
    for (int64_t m = 0; m < rows; ++m)
      layer_norm<Gelu<W>>(hidden + m * hidden_pad, view.hidden_dim, view.eps, vectors + hidden_pad,
                          vectors + 2 * hidden_pad);
    const float* bias = w.bias + role * dim_pad;
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < dim_pad; i += kLane)
        vec_store(out + m * dim_pad + i,
                  vec_add(vec_load(chunk + m * dim_pad + i), vec_load(bias + i)));
    }
    gemm_panels<W>(rows, view.hidden_dim, dim_pad, hidden, hidden_pad, second, out, dim_pad,
                   widened);
    for (int64_t m = 0; m < rows; ++m)
      memcpy(to + row_of[m] * dim_pad, out + m * dim_pad, dim_pad * sizeof(float));
  }

  void layer(int layer, int64_t begin, int64_t end) const {
    const float* from = work.x[layer % 2];
    float* to = work.x[(layer + 1) % 2];
    for (int64_t r = tokens.request[begin]; r <= tokens.request[end - 1]; ++r) {
      const RequestRows& request = tokens.requests[r];
      mean_row(from + request.begin * dim_pad, dim_pad, request.end - request.begin,
               means + r * dim_pad);
    }
    for (int role = 0; role < view.num_roles; ++role) {
      int64_t rows = 0;
      for (int64_t m = begin; m < end; ++m) {
        if (tokens.role[m] != role) continue;
        row_of[rows++] = m;
        if (rows == kChunkRows) {
          mlp(layer, role, rows, from, to);
          rows = 0;
        }
      }
      if (rows > 0) mlp(layer, role, rows, from, to);
    }
  }

  void finish(int64_t begin, int64_t end) const {
    float* x = work.x[view.num_layers % 2];
    for (int64_t m = begin; m < end; ++m) {
      layer_norm<Identity>(x + m * dim_pad, view.dim, view.eps, view.norm, view.norm + dim_pad);
      narrow_row(x + m * dim_pad, view.dim, view.dtype, states, tokens.source[m] * view.dim);
    }
  }

  void run(int stage, int64_t begin, int64_t end) const {
    if (begin == end) return;
    if (stage == 0) {
      embed(begin, end);
    } else {
      layer(stage - 1, begin, end);
    }
    if (stage == view.num_layers) finish(begin, end);
  }
};

void encode_mlp(const MlpPanels& view, const TokenRows& tokens, const MlpWork& work, int stage,
                int64_t begin, int64_t end, void* states, Arena& arena) {
  switch (view.dtype) {
    case DType::kFloat32:
      return MlpStage<Float32>(view, tokens, work, states, arena).run(stage, begin, end);
    case DType::kBFloat16:
      return MlpStage<BFloat16>(view, tokens, work, states, arena).run(stage, begin, end);
    case DType::kFloat16:
      return MlpStage<Float16>(view, tokens, work, states, arena).run(stage, begin, end);
  }
}

}  // namespace

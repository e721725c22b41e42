#include "cpu/encoders.h"

#include <algorithm>

namespace sidmlp::cpu {

namespace {

size_t float_bytes(int64_t n) { return arena_bytes(static_cast<size_t>(n) * sizeof(float)); }

int64_t attention_width(const T5Panels& view) { return view.num_heads * padded(view.head_dim); }

}  // namespace

size_t t5_work_bytes(const T5Panels& view, const TokenRows& rows) {
  const int64_t width = attention_width(view);
  return float_bytes(rows.count * padded(view.dim)) + 3 * float_bytes(rows.count * width) +
         2 * float_bytes(rows.padded_count * width) +
         float_bytes(view.num_heads * (2 * static_cast<int64_t>(rows.tokens) - 1));
}

T5Work t5_work(const T5Panels& view, const TokenRows& rows, Arena& arena) {
  const int64_t width = attention_width(view), span = 2 * static_cast<int64_t>(rows.tokens) - 1;
  auto take = [&](int64_t n) { return static_cast<float*>(arena.take(n * sizeof(float))); };
  T5Work work{};
  work.residual = take(rows.count * padded(view.dim));
  work.query = take(rows.count * width);
  for (int i = 0; i < 2; ++i) {
    work.key[i] = take(rows.padded_count * width);
    work.value[i] = take(rows.count * width);
  }
  work.bias = take(view.num_heads * span);
  for (int h = 0; h < view.num_heads; ++h) {
    const int64_t reach = view.bias_tokens - 1;
    const float* table = view.bias + h * (2 * reach + 1);
    for (int64_t i = 0; i < span; ++i) {
      const int64_t offset = std::clamp(i - (rows.tokens - 1), -reach, reach);
      work.bias[h * span + i] = table[offset + reach];
    }
  }
  return work;
}

size_t t5_scratch_bytes(const T5Panels& view, const TokenRows& rows) {
  const int64_t hidden = view.layers[0].ffn_up != nullptr ? 2 : 1;
  return float_bytes(kChunkRows * padded(view.dim)) +
         2 * float_bytes(kChunkRows * attention_width(view)) +
         float_bytes(kChunkRows * padded(rows.longest)) +
         hidden * float_bytes(kChunkRows * padded(view.ffn_dim)) + float_bytes(kPanel * kPanel);
}

size_t mlp_work_bytes(const MlpPanels& view, const TokenRows& rows) {
  return 2 * float_bytes(rows.count * padded(view.dim));
}

MlpWork mlp_work(const MlpPanels& view, const TokenRows& rows, Arena& arena) {
  MlpWork work{};
  for (float*& x : work.x)
    x = static_cast<float*>(arena.take(rows.count * padded(view.dim) * sizeof(float)));
  return work;
}

size_t mlp_scratch_bytes(const MlpPanels& view, const TokenRows& rows) {
  return float_bytes(rows.num_requests * padded(view.dim)) +
         3 * float_bytes(kChunkRows * padded(view.dim)) +
         2 * float_bytes(kChunkRows * padded(view.hidden_dim)) + float_bytes(kPanel * kPanel) +
         arena_bytes(kChunkRows * sizeof(int64_t));
}

}  // namespace sidmlp::cpu

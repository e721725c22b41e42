// Seeded T5 encoders and token ids in plain C++, in the layout of csrc/sidmlp/encoder_view.h. No
// torch.
//
// Poison: ids that the mask hides are far outside the vocabulary.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "native/device_arrays.h"
#include "sidmlp/encoder_view.h"

namespace sidmlp::native {

struct Case {
  const char* name;
  DType dtype = DType::kBFloat16;
  int dim = 128, layers = 4, heads = 6, head_dim = 64, ffn = 1024;
  Activation activation = Activation::kRelu;
  int tokens = 82, batch = 3;
  enum Mask { kFull, kPrefix, kAny } mask = kPrefix;
  bool bad_id = false;
  int reach = 0;  // the position bias is the same from this distance on; 0: nowhere
};

inline uint16_t narrow(DType dtype, float x) {
  return dtype == DType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                                   : __half_as_ushort(__float2half_rn(x));
}
inline float widen(DType dtype, uint16_t bits) {
  return dtype == DType::kBFloat16 ? __bfloat162float(__ushort_as_bfloat16(bits))
                                   : __half2float(__ushort_as_half(bits));
}

struct Matrix {
  std::vector<uint16_t> bits;
  std::vector<float> values;  // as rounded
};

struct Layer {
  Matrix qkv, out, ffn_in, ffn_out;
  std::vector<float> attention_gain, ffn_gain;
};

struct Model {
  Case sizes;
  int vocab = 500, bias_tokens;
  Matrix embedding;
  std::vector<float> bias, final_gain;
  std::vector<Layer> layers;

  explicit Model(const Case& c, uint64_t seed) : sizes(c), bias_tokens(c.tokens + 20) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    auto matrix = [&](int64_t rows, int64_t columns, float scale) {
      Matrix m;
      m.bits.resize(rows * columns);
      m.values.resize(rows * columns);
      for (int64_t i = 0; i < rows * columns; ++i) {
        m.bits[i] = narrow(c.dtype, normal(random) * scale);
        m.values[i] = widen(c.dtype, m.bits[i]);
      }
      return m;
    };
    auto gains = [&] {
      std::vector<float> g(c.dim);
      for (float& x : g) x = 1.0f + 0.2f * normal(random);
      return g;
    };
    const int width = c.heads * c.head_dim;
    embedding = matrix(vocab, c.dim, 1.0f);
    bias.resize(static_cast<size_t>(c.heads) * (2 * bias_tokens - 1));
    for (float& x : bias) x = normal(random);
    for (size_t i = 0; c.reach > 0 && i < bias.size(); ++i) {
      const int width = 2 * bias_tokens - 1, offset = static_cast<int>(i % width) - bias_tokens + 1;
      const int64_t row = static_cast<int64_t>(i) - offset;
      if (std::abs(offset) > c.reach) bias[i] = bias[row + (offset < 0 ? -c.reach : c.reach)];
    }
    final_gain = gains();
    for (int l = 0; l < c.layers; ++l) {
      Layer layer;
      const float in = 1.0f / std::sqrt(static_cast<float>(c.dim));
      layer.qkv = matrix(3 * width, c.dim, in);
      // T5's scores are not divided: its queries are small instead.
      for (int64_t i = 0; i < static_cast<int64_t>(width) * c.dim; ++i) {
        float& x = layer.qkv.values[i];
        layer.qkv.bits[i] = narrow(c.dtype, x / std::sqrt(static_cast<float>(c.head_dim)));
        x = widen(c.dtype, layer.qkv.bits[i]);
      }
      layer.out = matrix(c.dim, width, 1.0f / std::sqrt(static_cast<float>(width)));
      layer.ffn_in = matrix((is_gated(c.activation) ? 2 : 1) * c.ffn, c.dim, in);
      layer.ffn_out = matrix(c.dim, c.ffn, 1.0f / std::sqrt(static_cast<float>(c.ffn)));
      layer.attention_gain = gains();
      layer.ffn_gain = gains();
      layers.push_back(std::move(layer));
    }
  }

  // wgmma's blocks, as encoder_view.h states them; empty where they do not apply.
  std::vector<uint16_t> tiles() const {
    std::vector<uint16_t> all;
    auto add = [&](const Matrix& m, int64_t columns) {
      const int64_t rows = static_cast<int64_t>(m.bits.size()) / columns;
      const size_t at = all.size();
      if (rows % 64 != 0 || columns % 64 != 0) return false;
      all.resize(at + m.bits.size());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t block = r / 64 * (columns / 64) + k / 64, piece = k % 64 / 8 ^ r % 8;
          all[at + block * 4096 + r % 64 * 64 + piece * 8 + k % 8] = m.bits[r * columns + k];
        }
      return true;
    };
    for (const Layer& l : layers)
      if (!add(l.qkv, sizes.dim) || !add(l.out, sizes.heads * sizes.head_dim) ||
          !add(l.ffn_in, sizes.dim) || !add(l.ffn_out, sizes.ffn))
        return {};
    return all;
  }

  T5View view(DeviceArrays& device) const {
    T5View v{};
    v.dtype = sizes.dtype;
    v.vocab_size = vocab;
    v.dim = sizes.dim, v.num_layers = sizes.layers, v.num_heads = sizes.heads;
    v.head_dim = sizes.head_dim, v.ffn_dim = sizes.ffn, v.activation = sizes.activation;
    v.layer_norm_eps = 1e-6f, v.bias_tokens = bias_tokens;
    v.embedding = device.copy_of(embedding.bits);
    v.position_bias = device.copy_of(bias);
    v.final_gain = device.copy_of(final_gain);
    for (int l = 0; l < sizes.layers; ++l) {
      T5LayerView& to = v.layers[l];
      to.attention_gain = device.copy_of(layers[l].attention_gain);
      to.ffn_gain = device.copy_of(layers[l].ffn_gain);
      to.qkv = device.copy_of(layers[l].qkv.bits);
      to.attention_out = device.copy_of(layers[l].out.bits);
      to.ffn_in = device.copy_of(layers[l].ffn_in.bits);
      to.ffn_out = device.copy_of(layers[l].ffn_out.bits);
    }
    const std::vector<uint16_t> blocks = tiles();
    v.tiles = blocks.empty() ? nullptr : device.copy_of(blocks);
    return v;
  }
};

struct Input {
  int tokens;
  std::vector<int64_t> ids;
  std::vector<uint8_t> mask;
  int batch() const { return static_cast<int>(mask.size()) / tokens; }
  std::vector<int> valid(int request) const {
    std::vector<int> at;
    for (int t = 0; t < tokens; ++t)
      if (mask[request * tokens + t]) at.push_back(t);
    return at;
  }
};

constexpr int64_t kPoison = 0x7fffffffffff;  // where no id may be read

inline Input random_input(const Case& c, int vocab, int batch, double mean, uint64_t seed) {
  std::mt19937_64 random(seed);
  Input in{c.tokens, {}, {}};
  for (int b = 0; b < batch; ++b) {
    int count = c.tokens;
    if (c.mask != Case::kFull && mean > 0) {
      const double u = static_cast<double>(random() % 10000) / 10000;
      count = std::clamp(static_cast<int>(2 * mean * u), 1, c.tokens);
    } else if (c.mask != Case::kFull) {
      count = b == 1 ? 0 : b == 2 ? c.tokens : static_cast<int>(random() % (c.tokens + 1));
    }
    for (int t = 0; t < c.tokens; ++t) {
      const bool valid =
          c.mask == Case::kAny ? random() % c.tokens < static_cast<uint64_t>(count) : t < count;
      in.mask.push_back(valid);
      in.ids.push_back(valid ? static_cast<int64_t>(random() % vocab) : kPoison);
    }
  }
  return in;
}

// Requests `which` of `in`, with `more` masked tokens at the end of each.
inline Input pick(const Input& in, const std::vector<int>& which, int more) {
  Input out{in.tokens + more, {}, {}};
  for (const int b : which) {
    out.ids.insert(out.ids.end(), in.ids.begin() + b * in.tokens,
                   in.ids.begin() + (b + 1) * in.tokens);
    out.mask.insert(out.mask.end(), in.mask.begin() + b * in.tokens,
                    in.mask.begin() + (b + 1) * in.tokens);
    out.ids.insert(out.ids.end(), more, -kPoison);
    out.mask.insert(out.mask.end(), more, 0);
  }
  return out;
}

}  // namespace sidmlp::native

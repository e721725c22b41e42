// Plain structs that describe a T5 encoder to a kernel: pointers, sizes, and the shape of each
// array beside its field, as in views.h. The mathematics is sidmlp_kernels/encoder.py.
//
// Notation: V vocabulary, D state width, A = heads * head_dim, F feed-forward width. Matrices are
// row-major [out, in], as torch.nn.Linear holds them, without padding; each is rounded to the
// weights' dtype once and nothing is folded into it. Every pointer is 16-byte aligned.
#pragma once

#include <cstdint>

#include "sidmlp/views.h"

namespace sidmlp {

constexpr int kMaxEncoderLayers = 8;

// In the order of spec.py's FEED_FORWARDS. A gated one is act(W_0 n) * (W_1 n).
enum class Activation : int32_t {
  kRelu = 0,
  kGelu = 1,  // x Phi(x)
  kGatedRelu = 2,
  kGatedGelu = 3  // of the gate: the tanh approximation
};

constexpr bool is_gated(Activation activation) {
  return activation == Activation::kGatedRelu || activation == Activation::kGatedGelu;
}

struct T5LayerView {
  const float* attention_gain;  // [D], of the RMSNorm before attention
  const void* qkv;              // [3 * A, D]: W_q over W_k over W_v; rows of head h at h * head_dim
  const void* attention_out;    // [D, A]
  const float* ffn_gain;        // [D], of the RMSNorm before the feed-forward
  const void* ffn_in;           // [F, D] W_i; gated: [2 * F, D], W_i0 over W_i1
  const void* ffn_out;          // [D, F]
};

struct T5View {
  DType dtype;  // of the embedding and the matrices; gains and the position bias are always fp32
  int vocab_size;
  int dim;  // D
  int num_layers;
  int num_heads;
  int head_dim;
  int ffn_dim;  // F
  Activation activation;
  float layer_norm_eps;
  int bias_tokens;             // M: the most tokens of a request that the position bias covers
  const void* embedding;       // [V, D]
  const float* position_bias;  // [heads, 2 * M - 1]: of key j for query i at j - i + M - 1
  const float* final_gain;     // [D]
  T5LayerView layers[kMaxEncoderLayers];
  // The same matrices once more for wgmma, or nullptr: layer by layer qkv, attention_out, ffn_in,
  // ffn_out. A matrix [N, K] is [N / 64][K / 64] blocks of 64 rows of 64 elements (8 KB), where
  // 16-byte piece p of row r lies at piece p ^ (r % 8) of that row. Only where every N and K is a
  // multiple of 64; 128-byte aligned.
  const void* tiles;
};

// Token ids of a batch. Tokens whose mask is 0 may hold anything; a valid id outside 0 .. V - 1
// makes the states of its request NaN.
struct TokensView {
  const int64_t* ids;   // [batch, tokens]
  const uint8_t* mask;  // [batch, tokens], 1 = valid
  int64_t batch;
  int tokens;
};

}  // namespace sidmlp

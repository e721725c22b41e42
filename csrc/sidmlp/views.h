// Plain structs that describe one decode problem to a kernel: pointers, sizes, and the shape of
// each array beside its field. No torch, no ownership, usable from host and device.
// `sidmlp_kernels/packing.py` makes the arrays, csrc/torch fills the structs.
//
// Notation: D state width, A attention width, F readout FFN width, H head width, C_l codes of level
// l, L levels, n_l trie nodes of level l. A trailing `p` (Dp, Hp, ..) is the size rounded up to
// kLane; the padding holds zeros. "Input-major" means W[in][out], the transpose of torch.nn.Linear:
// a row of it is contiguous over outputs.
#pragma once

#include <cstdint>

namespace sidmlp {

constexpr int kMaxLevels = 8;
constexpr int kLane = 16;  // every row that a kernel reads is a multiple of 16 elements long

constexpr int kCodeRows = 32;  // codes come in so many rows at once; rows past the last are zeros

constexpr int64_t padded(int64_t n) { return (n + kLane - 1) / kLane * kLane; }

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Context readout (sidmlp_kernels/packing.py), with the absorbed attention of one query per user:
// keys and values are never formed. Product form (score_in == nullptr): scores come from r_h = q
// M_h, M_h = W_q,h^T W_k,h / sqrt(d), values from N_h = (W_o,h W_v,h)^T. Factored form: r_h = (q
// W_q,h^T) W_k,h / sqrt(d) and a = sum_h (y_h W_v,h^T) W_o,h^T.
struct ReadoutView {
  DType dtype;  // of the weight matrices; vectors are always fp32
  int dim;      // D
  int num_heads;
  int head_dim;  // d = A / num_heads
  int ffn_dim;   // F
  float layer_norm_eps;
  const void* query_weight;  // [D, Dp] input-major
  const float* vectors;  // [6, Dp]: query bias, norm1 gain, norm1 shift, ffn_out bias, norm2 gain,
                         // norm2 shift
  const void* score_in;  // factored: [D, heads * dp] W_q^T, each head padded; product form: nullptr
  const void* score_out;  // factored: [heads * d, Dp] W_k / sqrt(d); product: [D, heads * Dp], M_h
                          // side by side
  const void* value_in;   // factored: [D, heads * dp] W_v^T; product: [heads * D, Dp], N_h stacked
  const void* value_out;  // factored: [heads * d, Dp] W_o^T; product: nullptr
  const void* ffn_in;     // [D, Fp] input-major
  const float* ffn_in_bias;  // [Fp]
  const void* ffn_out;       // [F, Dp] input-major
};

struct HeadView {
  int num_codes;         // C_l
  const float* vectors;  // [3 * blocks - 1, Hp]: gain, shift of block 0, then bias, gain, shift of
                         // each further block
  const void* prefix_table;  // [C_1 + .. + C_{l-1}, Hp]: row (offset_j + c) is W_j e_j(c)
  const void* block_weight;  // [blocks - 1, H, Hp] input-major
  const void* out_weight;    // [C_l rounded up to kCodeRows, Hp] one row per code
  const float* out_bias;     // [C_l]
};

struct HeadsView {
  DType dtype;
  int num_levels;  // L
  int dim;         // D
  int hidden_dim;  // H
  int num_blocks;  // linear-norm-GELU blocks per head, >= 1
  float layer_norm_eps;
  const void* context_weight;  // [D, L * Hp]: every head's W_ctx side by side, input-major
  const float* context_bias;   // [L * Hp]: every head's first bias
  HeadView heads[kMaxLevels];
};

// The catalogue as a CSR trie. Nodes of a level are numbered in lexicographic order, so siblings
// are contiguous.
struct TrieView {
  int num_levels;
  int64_t num_items;
  int32_t num_nodes[kMaxLevels];           // n_1 .. n_L
  const int32_t* child_begin[kMaxLevels];  // [l]: [n_l + 1], children of a node of level l (l = 0
                                           // the root) in level l + 1
  const int16_t* codes[kMaxLevels];  // [l]: [n_{l+1}], code of each node of level l + 1, ascending
                                     // among siblings
  const int32_t* leaf_begin;         // [n_L + 1]
  const int64_t* leaf_item_ids;      // [num_items], catalogue order inside a leaf
  const uint8_t* leaf_available;     // [num_items], 1 = may be recommended
};

enum class LevelMode : int32_t {
  kSparse = 0,
  kDense = 1
};  // logits of children only, or of every code

struct DecodeConfig {
  int k;
  int num_beams;
  bool codebook;  // softmax over all codes at every level ("codebook"), else over children from
                  // level 2 on
  float temperature[kMaxLevels];     // > 0
  float level_weight[kMaxLevels];    // any finite number
  LevelMode level_mode[kMaxLevels];  // how logits are computed; changes no bit but on tensor cores
};

// Item ids that a request must not be given, ascending inside each request; ids == nullptr: nothing
// is excluded.
struct ExcludeView {
  const int64_t* ids;      // [total]
  const int64_t* offsets;  // [batch + 1]
};

struct StatesView {
  const void* states;  // [batch, tokens, D], contiguous
  DType dtype;
  const uint8_t* mask;  // [batch, tokens], 1 = valid; states of other tokens are never read
  int tokens;
};

struct ResultView {
  int64_t* items;   // [batch, k], -1 past counts
  float* scores;    // [batch, k], -inf past counts
  int32_t* codes;   // [batch, k, L], -1 past counts
  int32_t* counts;  // [batch]
};

}  // namespace sidmlp

// What the encoder kernels of the CPU read: weights in panels, and the valid tokens of a block of
// requests, one after another.
//
// A padded token costs nothing: kernels see rows of valid tokens only, so a request of 9 tokens is
// 9 rows whatever the batch is padded to. Work is cut into stages with a barrier between them;
// within a stage any rows may be computed by any thread, and no bit of a row depends on which.
//
// Panels: a matrix [inner, columns] (input-major, columns a multiple of 16) is stored as panels of
// 64 columns, the last one narrower, each [inner, width]: what a tile reads is contiguous, where
// rows of 1,024 floats would all fall into the same few sets of the cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/arena.h"
#include "sidmlp/encoder_view.h"
#include "sidmlp/views.h"

namespace sidmlp::cpu {

constexpr int kPanel = 64;
constexpr int kMaxRoles = kMaxLevels;
constexpr int64_t kChunkRows = 48;  // that pass through a layer together

// T5's encoder (sidmlp_kernels/encoder.py). A = heads * padded(head_dim); Dp, Fp as in
// sidmlp/views.h. Every padding of a weight holds zeros.
struct T5LayerPanels {
  const void* query;    // panels of [D, A], each head padded to a multiple of 16 columns
  const void* key;      // the same
  const void* value;    // the same
  const void* output;   // panels of [A, Dp]
  const void* ffn_in;   // panels of [D, Fp]
  const void* ffn_up;   // the same, gated feed-forwards only, else nullptr
  const void* ffn_out;  // panels of [F, Dp]
};
struct T5Panels {
  DType dtype;  // of embedding and panels
  int num_layers;
  int dim;  // D
  int num_heads;
  int head_dim;
  int ffn_dim;  // F
  int vocab_size;
  int bias_tokens;  // M: keys farther than M - 1 share the bias of that distance
  Activation activation;
  float eps;
  const void* embedding;  // [vocab, Dp]
  const float* bias;      // [heads, 2 M - 1]: of a key at offset -(M - 1) .. M - 1
  const float* norms;     // [2 layers + 1, Dp]: gains before attention and feed-forward of each
                          // layer, then the final one
  T5LayerPanels layers[kMaxEncoderLayers];
};

// SID-MLP++'s encoder (sidmlp_kernels/mlp_encoder.py). R roles, each with its own MLP in each
// layer.
struct MlpLayerPanels {
  const void* token;     // R times panels of [D, Hp]: the half of the first Linear that reads x
  const void* mean;      // R times panels of [D, Hp]: the half that reads the mean
  const float* vectors;  // [R, 3, Hp]: bias of the first Linear, gain and shift of LayerNorm
  const void* out;       // R times panels of [H, Dp]
  const float* bias;     // [R, Dp]: of the second Linear
};
struct MlpPanels {
  DType dtype;  // of embedding, positions and panels
  int num_layers;
  int num_roles;   // R
  int dim;         // D
  int hidden_dim;  // H
  int vocab_size;
  int max_length;
  float eps;
  const void* embedding;  // [vocab, Dp]
  const void* positions;  // [max_length, Dp]
  const float* norm;      // [2, Dp]: gain and shift of the final LayerNorm
  MlpLayerPanels layers[kMaxEncoderLayers];
};

// The valid tokens of some requests as rows, request after request, by position; made by
// cpu/token_rows.h.
struct RequestRows {
  int64_t begin, end;    // its rows
  int64_t padded_begin;  // sum of the row counts of the requests before, each padded to kLane
};
struct TokenRows {
  int tokens;  // T
  int64_t count;
  int64_t padded_count;         // sum of all row counts, each padded to kLane
  int64_t longest;              // rows of the longest request
  int64_t num_requests;         // with valid tokens
  const RequestRows* requests;  // [num_requests]
  const int32_t* request;       // [count] index into requests
  const int32_t* position;      // [count] t of the token
  const int32_t* role;          // [count] of SID-MLP++'s encoder
  const int64_t* id;            // [count] in the vocabulary
  const int64_t* source;        // [count] b * T + t: where its state goes
};

// Memory that the threads of a block of requests share.
struct T5Work {
  float* residual;  // [count, Dp]
  float* query;     // [count, A]
  float* key[2];    // of each request a block [A, padded rows]: keys in columns
  float* value[2];  // [count, A]; two buffers: a stage reads a layer's and writes the next one's
  float* bias;      // [heads, 2 T - 1]: of a key at offset -(T - 1) .. T - 1
};
size_t t5_work_bytes(const T5Panels&, const TokenRows&);
T5Work t5_work(const T5Panels&, const TokenRows&, Arena&);
size_t t5_scratch_bytes(const T5Panels&, const TokenRows&);  // of one thread in one stage

struct MlpWork {
  float* x[2];  // [count, Dp]; layer l reads x[l % 2] and writes the other
};
size_t mlp_work_bytes(const MlpPanels&, const TokenRows&);
MlpWork mlp_work(const MlpPanels&, const TokenRows&, Arena&);
size_t mlp_scratch_bytes(const MlpPanels&, const TokenRows&);

}  // namespace sidmlp::cpu

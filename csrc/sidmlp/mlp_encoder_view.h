// SID-MLP++'s encoder as the CUDA kernel reads it: pointers, sizes, and the shape of each array
// beside its field. The mathematics is sidmlp_kernels/mlp_encoder.py.
//
// Notation: V vocabulary, D state width, H hidden width, R roles; Dp and Hp are those rounded up to
// a multiple of 16 (views.h). Paddings hold zeros. Every pointer is 16-byte aligned.
//
// Fragments: a matrix [N, K] (rows are outputs, as torch.nn.Linear holds them; both padded) is
// stored as [N / 16][K / 16] blocks of 256 elements, in the order in which the lanes of a warp
// multiply. With g = 0 .. 7 and t = 0 .. 3, element (n, k) of a block lies
//   in half precision  n = 8 j + g, k = 8 h + 2 t + e   at 8 (4 g + t) + 4 j + 2 h + e
//   in fp32            n = 8 j + 2 t + e, k = 4 q + i   at 64 q + 16 t + 8 j + 4 e + i
#pragma once

#include <cstdint>

#include "sidmlp/encoder_view.h"
#include "sidmlp/views.h"

namespace sidmlp {

struct MlpLayerView {
  const void* token;     // R times fragments of [Hp, Dp]: the half of the first Linear that reads x
  const void* mean;      // R times fragments of [Hp, Dp]: the half that reads the mean
  const float* vectors;  // [R, 3, Hp]: bias of the first Linear, gain and shift of LayerNorm
  const void* out;       // R times fragments of [Dp, Hp]
  const float* bias;     // [R, Dp]: of the second Linear
};

struct MlpView {
  DType dtype;  // of embedding, positions and fragments
  int num_layers;
  int num_roles;   // R, 1 .. kMaxLevels
  int dim;         // D
  int hidden_dim;  // H
  int vocab_size;
  int max_length;
  float eps;
  const void* embedding;  // [V, Dp]
  const void* positions;  // [max_length, Dp]
  const float* norm;      // [2, Dp]: gain and shift of the final LayerNorm
  MlpLayerView layers[kMaxEncoderLayers];
};

}  // namespace sidmlp

// The wgmma form of the throughput encoder: which models it takes.
#pragma once

#include "cuda/sm90/encoder/encode_t5.h"
#include "cuda/sm90/encoder/shape.h"

namespace sidmlp::cuda::sm90 {

constexpr int kWideTiles = 12;  // tiles of 16 rows at once: three warpgroups of 64 rows
constexpr int kWideDim = 128;
constexpr int kWideHead = 64;
constexpr int kWideMostHeads = 8;

// Whether the model, never the request, is one for wgmma: the two forms round in another order.
constexpr bool takes_wide(const T5View& m) {
  return m.tiles != nullptr && m.dim == kWideDim && m.head_dim == kWideHead &&
         m.num_heads <= kWideMostHeads && m.ffn_dim % 64 == 0 && !is_gated(m.activation) &&
         m.bias_tokens <= kTileRows * kWideTiles;
}

int wide_shared_bytes(const EncodeT5Problem& problem);  // of a block

// Kernels by dtype, each in a file of its own.
const void* wide_bf16(Activation activation);
const void* wide_fp16(Activation activation);

constexpr int kWideThreads = 512;  // three warpgroups, and one for the copies

}  // namespace sidmlp::cuda::sm90

// The form for long requests: which models it takes, and its workspace.
#pragma once

#include "cuda/sm90/encoder/encode_t5.h"
#include "cuda/sm90/encoder/shape.h"

namespace sidmlp::cuda::sm90 {

constexpr int kLongRows = 64;  // of a tile: a warpgroup's
constexpr int kLongHead = 64;
constexpr int kLongMostHeads = 16;
constexpr int kLongThreads = 384;    // two warpgroups that compute, one that copies
constexpr int kLongMostTiles = 528;  // whose activations the workspace holds at once: four a block
constexpr int kLongBlock = 8192;     // bytes of 64 rows of 64 elements

// A batch of more columns takes this form, but for the models of wide.h. By hand on an H200, bf16,
// D 256, 6 heads of 64, F 1024, 4 layers, 128 requests of 130 tokens: 742 microseconds, throughput
// 1,948.
constexpr int kLongTokens = 128;

// Why the form does not take a model; nullptr when it does.
constexpr const char* long_why_not(const T5View& m) {
  if (m.tiles == nullptr) return "long: expected widths that are multiples of 64";
  if (m.dim != 128 && m.dim != 256) return "long: expected dim 128 or 256";
  if (m.head_dim != kLongHead || m.num_heads > kLongMostHeads)
    return "long: expected at most 16 heads of 64";
  if (m.ffn_dim % 128 != 0) return "long: expected an ffn_dim that is a multiple of 128";
  if (is_gated(m.activation)) return "long: expected a feed-forward without a gate";
  return nullptr;
}

// Where the workspace has what, in bytes. A tile is 64 rows of one request.
struct LongShape {
  int tiles;         // that fit
  int64_t x;         // fp32 [tiles][64 * D], in the order of the accumulators
  int64_t qkv;       // [tiles][3 * heads] blocks: queries, keys, values of 64 rows
  int64_t mixed;     // [tiles][heads] blocks
  int64_t zeros;     // a block
  int64_t position;  // int32 [tiles][64]: of a row's token in its request, 0 where there is none
  int64_t requests;  // int2 [batch]: tokens, and the first one's position or -1: see kernel
  int64_t reach;     // int32 [blocks of the launch]
  int64_t arrived;   // uint32: blocks that came to a barrier of the grid, of all of them
  int64_t bytes;
};

LongShape long_shape(const EncodeT5Problem& problem, int blocks);
int long_shared_bytes();

// Kernels by dtype, each in a file of its own.
const void* long_bf16(int dim, Activation activation);
const void* long_fp16(int dim, Activation activation);

}  // namespace sidmlp::cuda::sm90

// How the general encoder kernel lies in shared memory, chosen by host code.
//
// A half-precision row in shared memory is a multiple of 128 bytes. Its 16-byte piece p lies at
// piece p ^ f(row), f(row) = row % 2 * 4 + row / 2 % 4: neither eight rows of one piece nor two
// rows of four pieces share a bank.
#pragma once

#include <cstdint>

#include "cuda/sm90/encoder/encode_t5.h"

namespace sidmlp::cuda::sm90 {

constexpr int kTileRows = 16;  // rows of a tensor core tile
constexpr int kMaxTiles = 6;   // tiles of rows that a block computes at once
constexpr int kMaxEncodeRows = kTileRows * kMaxTiles;
constexpr int kEncodeBlockBytes = 3072;  // of EncodeBlock, before all else in shared memory
constexpr int kKeyBlock = 64;            // keys between two corrections of a softmax

// Of a block. 384 leave too few registers: batch 8 took 141 microseconds in clusters of eight where
// 256 take 116.
constexpr int kEncodeThreads = 256;

struct EncodeShape {
  int cluster;   // blocks that share a request
  int clusters;  // of the launch
  int tiles;     // at most kMaxTiles; longer requests go through the workspace
  int heads_at_once;
  int ffn_chunk;  // hidden columns between two sums into the residual
  int x_bytes;    // of a row of the residual and of its partial sums
  int normed_bytes, head_bytes, mixed_bytes, hidden_bytes;  // of half-precision rows
  // Byte offsets into dynamic shared memory.
  int x, partial, normed, mixed, query, key, value, hidden, bias;
  int bias_stride;  // floats a head
  int bias_heads;   // of the position bias in shared memory: all of a block's, or heads_at_once
  int own_heads;    // the most heads of a block
  int shared_bytes;
  // Of a block, byte offsets into its workspace; all 0 where every request fits.
  int64_t workspace_x, workspace_position, workspace_kv, workspace_bytes;
};

EncodeShape encode_shape(const EncodeT5Problem& problem, EncodeForm form);

// Kernels by dtype, each in a file of its own; one for heads of 64, one for all others.
const void* encode_t5_bf16(int head_dim);
const void* encode_t5_fp16(int head_dim);

}  // namespace sidmlp::cuda::sm90

// Which sizes the sm90 kernels take, and how a batch is cut among clusters of thread blocks. Plain
// C++: the host module shows this table to Python.
#pragma once

#include <climits>

namespace sidmlp::cuda::sm90 {

constexpr int kMaxBeams = 128;
constexpr int kMaxCodes = 1024;
constexpr int kMaxDim = 1024;
constexpr int kMaxHidden = 2048;

// A cluster of `cluster` blocks takes `group` requests. The products that all beams of a request
// share are computed for the group at once, each block some of the columns. Then each request
// belongs to a team of cluster / group blocks, which share its beams, or each block to group /
// cluster requests, one after the other. All are powers of two. A cut never changes a bit of a
// result.
struct Cut {
  int most_requests;  // a batch of at most so many is cut like this
  int cluster;
  int group;
  const char* reason;
};

// Measured by hand on an H200 (132 multiprocessors, two blocks each) with bf16, 50 beams, Beauty's
// catalogue, 2026-11-22; microseconds of a graph replay. Batches 1 and 32 in an earlier form of the
// kernels than the others: compare figures inside a row only.
constexpr Cut kCuts[] = {
    {16, 8, 1, "the chip is idle: eight blocks a request; batch 1: 8 blocks 48, 4 blocks 53"},
    {32, 8, 2,
     "four blocks a request fill the chip; batch 32: 56, clusters of 4 for one request 59, "
     "8 blocks a request do not fit at once: 134"},
    {64, 8, 4, "two blocks a request; batch 64: 66, clusters of 4 for two requests 69"},
    {264, 2, 2, "a block a request while all fit at once; batch 256: 96, two requests a block 124"},
    {INT_MAX, 2, 4,
     "two requests a block share first products; batch 512: 162, 4096: 1,208, "
     "four a block 1,372"},
};

// What the choice between kernels depends on.
struct DecodeSizes {
  bool half;  // bf16 or fp16 weights
  int dim;
  int hidden_dim;
  int blocks_per_head;
  int most_codes;  // of a level
  int num_beams;
};

// Why the kernels do not take these sizes, so that the plain kernel does; nullptr when they do.
constexpr const char* why_not(const DecodeSizes& sizes) {
  if (!sizes.half) return "float32 weights: tensor cores would round them";
  if (sizes.blocks_per_head != 1) return "blocks_per_head: expected 1";
  if (sizes.hidden_dim % 32 != 0 || sizes.hidden_dim > kMaxHidden)
    return "hidden_dim: expected a multiple of 32 up to 2048";
  if (sizes.dim % 16 != 0 || sizes.dim > kMaxDim)
    return "dim: expected a multiple of 16 up to 1024";
  if (sizes.num_beams > kMaxBeams) return "num_beams: expected at most 128";
  if (sizes.most_codes > kMaxCodes) return "codes_per_level: expected at most 1024";
  return nullptr;
}

}  // namespace sidmlp::cuda::sm90

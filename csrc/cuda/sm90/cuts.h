// Which sizes the sm90 kernels take, and how a batch is cut among clusters of thread blocks. Plain
// C++: the host module shows these tables to Python.
#pragma once

#include <climits>

namespace sidmlp::cuda::sm90 {

constexpr int kMaxBeams = 512;
constexpr int kMaxCodes = 8192;
constexpr int kFewBeams = 128;  // beam.cuh takes so many beams and codes, wide_beam.cuh more
constexpr int kFewCodes = 1024;
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
  int resident;  // blocks on a multiprocessor: alone, a block has twice the registers and no spills
  const char* reason;
};

// Measured by hand on an H200 (132 multiprocessors; 15, 30 or 66 clusters of 8, 4 or 2 blocks that
// have a multiprocessor each) with bf16, 50 beams, Beauty's catalogue, 2026-11-22; microseconds of
// a graph replay. What stands in brackets is (cluster, group, blocks on a multiprocessor).
constexpr Cut kCuts[] = {
    {15, 8, 1, 1, "the chip is idle: eight blocks a request; batch 15: 42, (4,1,1) 44, (8,1,2) 47"},
    {30, 4, 1, 1, "four blocks a request; batch 30: 44, (8,2,1) 44, (8,2,2) 50"},
    {60, 4, 2, 1, "two blocks a request; batch 32: 47, (8,2,2) 54"},
    {66, 2, 1, 1, "two blocks a request; batch 64: 52, (2,2,1) 57, (8,4,2) 60, (4,2,1) 88"},
    {132, 2, 2, 1, "a block a request; batch 132: 60, (2,2,2) 69"},
    {264, 2, 2, 2, "a block a request while all fit at once; batch 256: 86, (2,4,2) 124"},
    {INT_MAX, 2, 4, 2,
     "two requests a block share first products; batch 512: 142, (1,2,2) 164, (2,2,2) 168"},
};

// Cuts of wide_beam.cuh, whose blocks have one request and a multiprocessor each: of many beams,
// and of wide codebooks, where level 1's weights (8 MB of 8,192 codes at H = 512) are read once a
// group. Measured as above, with 12,101 items, 512 beams of 4 x 256 codes and 24,000 items, 50
// beams of 3 x 8,192.
constexpr Cut kBeamCuts[] = {
    {15, 8, 1, 1, "many beams, the chip is idle: eight blocks a request"},
    {30, 4, 1, 1, "many beams: four blocks a request"},
    {66, 2, 1, 1, "many beams: two blocks a request"},
    {INT_MAX, 2, 2, 1, "many beams: a block a request; batch 512: 748, (4,4,1) 897, (8,8,1) 892"},
};
constexpr Cut kCodeCuts[] = {
    {15, 8, 1, 1, "wide codebooks, the chip is idle: eight blocks a request"},
    {60, 8, 4, 1, "wide codebooks: two blocks a request"},
    {INT_MAX, 8, 8, 1,
     "wide codebooks: a block a request; batch 512: 413, (4,4,1) 589, (2,2,1) 795"},
    {INT_MAX, 2, 2, 1,
     "wide codebooks: a block a request, where eight need more shared memory than there is"},
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
  if (sizes.num_beams > kMaxBeams) return "num_beams: expected at most 512";
  if (sizes.most_codes > kMaxCodes) return "codes_per_level: expected at most 8192";
  return nullptr;
}

}  // namespace sidmlp::cuda::sm90

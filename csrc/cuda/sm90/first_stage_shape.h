// A decode in two launches: how the first, the first stage of all requests, is spread over clusters
// of blocks, and what it leaves for the second. Plain C++.
#pragma once

#include <climits>
#include <cstdint>

#include "cuda/sm90/cuts.h"
#include "cuda/sm90/readout_shape.h"

namespace sidmlp::cuda {

struct BeamDecodeProblem;

namespace sm90 {

constexpr int kMaxFirstGroup = 16;  // requests of a cluster: a tile of rows

struct FirstStageCut {
  int most_requests;  // a batch of at most so many is cut like this
  int cluster;
  int group;
};

// With contexts given. Measured by hand on an H200 with bf16, 50 beams, Beauty's catalogue,
// 2026-11-22; microseconds of a graph replay of both launches. What stands in brackets is (cluster,
// group). States are read by the cuts of the one launch (kCuts), which suit the readout: batch 512:
// 196 as (2,4), 275 as (4,8); batch 128: 97 as (2,2), 100 as (4,4), 138 as (8,8).
constexpr FirstStageCut kFirstStageCuts[] = {
    {16, 8, 1},        // batch 1: 44, (4,1) 46, (1,1) 57
    {32, 8, 4},        // batch 32: 49, (8,8) 49, (4,4) 51, (8,1) 58
    {64, 8, 8},        // batch 64: 51, (8,16) 52, (4,8) 53, (2,4) 56
    {132, 8, 16},      // batch 128: 58, (8,8) 60, (2,4) 62
    {264, 4, 16},      // batch 256: 82, (8,16) 82, (2,8) 84
    {512, 2, 8},       // batch 512: 146, (4,16) 147, (8,8) 160
    {INT_MAX, 2, 16},  // batch 1024: 266, (4,16) 280; batch 4096: 1,015, (4,16) 1,053
};

// Cuts of the second launch, the levels, measured likewise: no products are shared there, so a
// block has one request.
constexpr Cut kLevelCuts[] = {
    {15, 8, 1, 1, "the chip is idle: eight blocks a request"},
    {30, 4, 1, 1, "four blocks a request"},
    {66, 2, 1, 1, "two blocks a request; batch 32: 51, (1,1,1) 55, (4,1,1) 80"},
    {132, 1, 1, 1, "a block a request; batch 128: 59, (2,1,2) 70, (1,1,2) 77"},
    {INT_MAX, 1, 1, 2,
     "two requests on a multiprocessor; batch 512: 155, (1,2,2) 154; 4096: 1,045, (1,2,2) 1,052"},
};

// Byte offsets into dynamic shared memory of a block.
struct FirstStageShape {
  int cluster_shift, group;
  int context_bytes;  // from a context to the next
  int row_bytes;      // from a hidden row to the next
  int root_stride;    // floats, in global memory too
  int first;          // float [group / cluster, at least 1][H]: context part of level 1
  int contexts;       // W [group] rows
  int readout;        // what the readout needs, then, in its place:
  int hidden;         // W [group] rows of level 1
  int partial;        // float: quarters of the logits of level 1
  ReadoutShape reads;
  int bytes;
};

FirstStageShape first_stage_shape(const BeamDecodeProblem& problem);

int64_t num_blocks(const BeamDecodeProblem& problem, const FirstStageShape& shape);

// What the first launch leaves: float [batch, L * H] context parts of the first layers, then float
// [batch, root_stride] logits of level 1.
int64_t first_stage_bytes(const BeamDecodeProblem& problem, const FirstStageShape& shape);

// Why the problem cannot be decoded in two launches; nullptr when it can. The batch does not
// matter.
const char* two_launches_why_not(const BeamDecodeProblem& problem);

}  // namespace sm90
}  // namespace sidmlp::cuda

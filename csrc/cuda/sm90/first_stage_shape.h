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

constexpr int kMaxFirstGroup = 32;  // requests of a cluster
static_assert(kMaxFirstGroup % 16 == 0, "tiles of 16 rows");

struct FirstStageCut {
  int most_requests;  // a batch of at most so many is cut like this
  int cluster;
  int group;  // with states at most kMostReadTogether
};

constexpr int kMostReadTogether = 8;

// Guessed, not tuned: enough blocks for a chip of 132 multiprocessors first, then requests that
// share a read of the weights.
constexpr FirstStageCut kFirstStageCuts[] = {
    {16, 8, 1}, {32, 8, 2}, {64, 8, 4}, {128, 8, 8}, {512, 4, 8}, {1024, 4, 16}, {INT_MAX, 4, 32},
};

// Cuts of the second launch, the levels: no products are shared there, so a block has one request.
constexpr Cut kLevelCuts[] = {
    {15, 8, 1, 1, "the chip is idle: eight blocks a request"},
    {30, 4, 1, 1, "four blocks a request"},
    {66, 2, 1, 1, "two blocks a request"},
    {132, 1, 1, 1, "a block a request"},
    {INT_MAX, 1, 1, 2, "two blocks, so two requests, on a multiprocessor"},
};

// In ascending order; the last takes any batch.
constexpr const Cut* cuts_of(int launches) { return launches == 2 ? kLevelCuts : kCuts; }

// Byte offsets into dynamic shared memory of a block.
struct FirstStageShape {
  int cluster_shift, group;
  int context_bytes;  // from a context to the next
  int row_bytes;      // from a hidden row to the next
  int root_stride;    // floats, in global memory too
  int first;          // float [group / cluster][H]: context part of level 1
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

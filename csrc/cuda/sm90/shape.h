// How a decode is spread over clusters of thread blocks, and where its arrays lie in shared memory.
// Host code: all choices of the sm90 kernels are made here.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace sidmlp::cuda::sm90 {

constexpr int kMaxBeams = 128;
constexpr int kMaxHidden = 2048;
constexpr int kMaxRows = 64;   // hidden rows that are multiplied with the codes at once
constexpr int kMaxGroup = 16;  // requests that share their first products
constexpr int kBins = 1024;    // of the top-k's histogram
constexpr int kSurvivors = 256;
constexpr int kDirect = 128;  // keys that are ranked without a histogram

// A cluster of `cluster` blocks takes `group` requests. The products that all beams of a request
// share are computed for the group at once, each block some of the columns. Then each request
// belongs to a team of `team` blocks (cluster / group, at least 1), which share its beams, or each
// block to `users` requests (group / cluster, at least 1), one after the other.
struct Cut {
  int most_requests;  // a batch of at most so many is cut like this
  int cluster;
  int group;
};

// Byte offsets into dynamic shared memory.
struct Shape {
  int cluster, group, users;
  int cluster_shift, team_shift;  // cluster and team are powers of two
  int rows;                       // hidden rows at once, at most kMaxRows
  int row_bytes;      // of a hidden row: H elements and a gap that spreads rows over banks
  int context_bytes;  // of a row of the contexts
  int logit_stride;   // floats of a row of logits
  int root_stride;    // floats of the logits of level 1
  int key_capacity;
  int beams;  // num_beams, rounded up to 32
  bool logits_over_hidden;
  // float [users][L * Hp], W [group][..], ..
  int first, contexts, hidden, logits, partial, root_logits, keys, beam_state, bins, survivors;
  ContextReadoutLayout readout;  // decode_states: from `hidden` on, before the levels begin
  int shared_bytes;
};

// Why the kernels do not take this problem; nullptr when they do.
const char* why_not(const BeamDecodeProblem& problem);

Shape shape_of(const BeamDecodeProblem& problem);

// One launch; `shape` from shape_of.
cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, cudaStream_t stream);

}  // namespace sidmlp::cuda::sm90

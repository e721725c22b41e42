// How a decode is spread over clusters of thread blocks, and where its arrays lie in shared memory.
// Plain C++: all choices of the sm90 kernels are made here, for the launch and for the host module.
#pragma once

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/sm90/cuts.h"
#include "cuda/sm90/first_stage_shape.h"
#include "cuda/sm90/readout_shape.h"

namespace sidmlp::cuda {

struct BeamDecodeProblem;
struct ContextReadoutProblem;

namespace sm90 {

constexpr int kMaxRows = 64;  // hidden rows that are multiplied with the codes at once
constexpr int kMaxGroup = 8;  // requests that share their first products
constexpr int kBins = 1024;   // of the top-k's histogram
constexpr int kSurvivors = 256;
constexpr int kDirect = 128;  // keys that are ranked without a histogram

// Of wide_beam.cuh.
constexpr int kWideSurvivors = 1024;
constexpr int kChunk = 256;               // codes whose logits are in shared memory at once
constexpr int kChunkStride = kChunk + 8;  // floats of a row of them: four lie in different banks

// Bytes from a hidden row to the next: eight rows lie in different banks.
constexpr int hidden_row_bytes(int hidden_dim) { return (2 * hidden_dim + 127) / 128 * 128 + 16; }
constexpr int kFixed = 2048;  // static shared memory of the kernel, rounded up

// Byte offsets into dynamic shared memory.
struct Shape {
  int cluster, group, users, resident;
  int cluster_shift, team_shift;  // cluster and team are powers of two
  int rows;                       // hidden rows at once, at most kMaxRows
  int row_bytes;                  // hidden_row_bytes
  int context_bytes;              // of a row of the contexts
  int logit_stride;               // floats of a row of logits
  int root_stride;                // floats of the logits of level 1
  int key_capacity;
  int beams;  // num_beams, rounded up to 32
  bool logits_over_hidden;
  float inverse_temperature[kMaxLevels];
  // float [users][L * Hp], W [group][..], ..
  int first, contexts, hidden, logits, partial, root_logits, keys, beam_state, bins, survivors;
  // decode_states: one of them, from `hidden` on, before the levels begin
  bool tensor_core_readout;
  ReadoutShape readout;
  ContextReadoutLayout plain_readout;
  // Many beams or codes: wide_beam.cuh.
  bool wide;
  int root_tiles;   // tiles of 16 codes of level 1 whose partial sums are kept at once
  int staged_rows;  // of prefix tables, by a warp
  // BeamKey [team][num_beams], int [beams], int [beams + 1]
  int exchange, head_list, first_key;
  int level_bytes;   // of all that is not the readout's
  int shared_bytes;  // of a block
};

// Why the kernels do not take this problem; nullptr when they do. Neither the batch nor the number
// of tokens decides: the plain kernel rounds otherwise, and they must not change a result.
const char* why_not(const BeamDecodeProblem& problem);

// Whether wide_beam.cuh decodes what why_not takes, in one launch: a matter of model and settings.
bool is_wide(const BeamDecodeProblem& problem);

// The cuts of a kernel, by batch.
struct Cuts {
  const Cut* first;
  const Cut* last;

  const Cut* begin() const { return first; }
  const Cut* end() const { return last; }
};

// Of the kernel that takes the problem. Like why_not, this, is_wide and cut_of read sizes and no
// pointer, and want sizes that why_not(DecodeSizes) takes. launches: 2 for the second of two.
Cuts cuts_of(const BeamDecodeProblem& problem, int launches = 1);

// The cut for the batch, or else any that fits: cuts do not change results. nullptr: none fits.
const Cut* cut_of(const BeamDecodeProblem& problem, int launches = 1);

Shape shape_of(const BeamDecodeProblem& problem, int launches = 1);

// The cut for a batch that is only read out.
const Cut& cut_of_batch(int64_t batch);

int64_t num_blocks(const BeamDecodeProblem& problem, const Shape& shape);
int64_t num_blocks(const ContextReadoutProblem& problem, const ReadoutShape& shape);

}  // namespace sm90
}  // namespace sidmlp::cuda

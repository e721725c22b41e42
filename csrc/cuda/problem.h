// What each operation of the CUDA backend is asked to do: pointers and sizes. Plain C++, as the
// host module compiles what chooses by them.
#pragma once

#include <cstdint>

#include "sidmlp/views.h"

namespace sidmlp::cuda {

struct BeamDecodeProblem {
  int64_t batch;
  const float* context;  // [batch, D], or nullptr: computed from `states` with `readout`
  ReadoutView readout;   // only read without `context`; its dtype is that of `heads`
  StatesView states;     // likewise
  HeadsView heads;
  TrieView trie;
  DecodeConfig config;
  ExcludeView exclude;
  int64_t num_excluded;  // length of exclude.ids; offsets are clamped to it
  ResultView result;
};

struct ContextReadoutProblem {
  int64_t batch;
  ReadoutView readout;
  StatesView states;
  float* context;  // [batch, D], result
};

struct LevelLogitsProblem {
  int64_t rows;
  int level;  // index, 0-based
  HeadsView heads;
  const float* context;         // [rows, D]
  const int32_t* prefix_codes;  // [rows, level]; a row with a code out of range gets NaN
  float* logits;                // [rows, C of the level], result
};

}  // namespace sidmlp::cuda

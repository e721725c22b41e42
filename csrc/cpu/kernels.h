// The CPU kernels as one table of functions per instruction set; `select_kernels` picks a table at
// run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/arena.h"
#include "cpu/encoders.h"
#include "sidmlp/views.h"

namespace sidmlp::cpu {

// kAvx512Bf16 differs from kAvx512 where encoders multiply bfloat16 weights (gemm_panels.inl).
enum class Isa : int32_t { kAuto = 0, kPlain = 1, kAvx2 = 2, kAvx512 = 3, kAvx512Bf16 = 4 };

constexpr int kMaxBlock =
    16;  // requests that one call of a kernel takes: they share each weight that is read

// Every kernel but the encoders computes requests [begin, end), at most kMaxBlock of them, on the
// calling thread, in the memory of `arena`. A request's result has the same bits whatever block it
// is in: blocks share loads, never a reduction.
struct Kernels {
  const char* name;

  // context [end - begin, context_stride] <- readout of encoder states (readout.inl).
  void (*context_readout)(const ReadoutView&, const StatesView&, int64_t begin, int64_t end,
                          float* context, int64_t context_stride, Arena&);

  // All levels of beam search. Row 0 of `context` is request `begin`.
  void (*beam_decode)(const HeadsView&, const TrieView&, const DecodeConfig&, const ExcludeView&,
                      int64_t begin, int64_t end, const float* context, int64_t context_stride,
                      const ResultView&, Arena&);

  // logits [rows, C_l] of level index `level` for contexts [rows, D] and prefixes codes [rows,
  // level], 0-based codes.
  void (*level_logits)(const HeadsView&, int level, int64_t rows, const float* context,
                       int64_t context_stride, const int32_t* prefix_codes, float* logits, Arena&);

  // Stage `stage` of 0..num_layers for rows [begin, end) (t5_encoder.inl); the last one writes
  // states [batch, T, D] in the dtype of the weights. All rows of a stage come before any of the
  // next.
  void (*encode_t5)(const T5Panels&, const TokenRows&, const T5Work&, int stage, int64_t begin,
                    int64_t end, void* states, Arena&);

  // The same for SID-MLP++'s encoder (mlp_encoder.inl).
  void (*encode_mlp)(const MlpPanels&, const TokenRows&, const MlpWork&, int stage, int64_t begin,
                     int64_t end, void* states, Arena&);
};

bool isa_supported(Isa isa);  // by this processor and this build
const Kernels& select_kernels(
    Isa isa);  // kAuto: the widest; throws std::runtime_error where isa_supported is false

// Arena bytes that each kernel needs.
size_t context_readout_bytes(const ReadoutView&, int tokens);
size_t beam_decode_bytes(const HeadsView&, const TrieView&, const DecodeConfig&);
size_t level_logits_bytes(const HeadsView&, int level);

}  // namespace sidmlp::cpu

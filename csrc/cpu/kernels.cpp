#include "cpu/kernels.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/kernels_isa.h"
#include "cpu/selection.h"

namespace sidmlp::cpu {

bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kAuto:
    case Isa::kPlain:
      return true;
#if defined(SIDMLP_X86)
    case Isa::kAvx2:
      // F16C came before AVX2; older compilers do not know its name here.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f");
    case Isa::kAvx512Bf16:
      return isa_supported(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
#else
    case Isa::kAvx2:
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return false;
#endif
  }
  return false;
}

const Kernels& select_kernels(Isa isa) {
  if (!isa_supported(isa))
    throw std::runtime_error("this processor or this build lacks the requested instruction set");
#if defined(SIDMLP_X86)
  if (isa == Isa::kAvx512Bf16 || (isa == Isa::kAuto && isa_supported(Isa::kAvx512Bf16)))
    return avx512bf16::kKernels;
  if (isa == Isa::kAvx512 || (isa == Isa::kAuto && isa_supported(Isa::kAvx512)))
    return avx512::kKernels;
  if (isa == Isa::kAvx2 || (isa == Isa::kAuto && isa_supported(Isa::kAvx2))) return avx2::kKernels;
#endif
  return plain::kKernels;
}

namespace {

size_t float_bytes(int64_t n) { return arena_bytes(static_cast<size_t>(n) * sizeof(float)); }

}  // namespace

size_t context_readout_bytes(const ReadoutView& view, int tokens) {
  const int64_t dim_pad = padded(view.dim), head_pad = padded(view.head_dim);
  return float_bytes(tokens * dim_pad) + float_bytes(view.num_heads * padded(tokens)) +
         3 * float_bytes(kMaxBlock * dim_pad) + float_bytes(kMaxBlock * view.num_heads * head_pad) +
         float_bytes(kMaxBlock * view.num_heads * dim_pad) +
         float_bytes(kMaxBlock * padded(view.ffn_dim));
}

size_t beam_decode_bytes(const HeadsView& heads, const TrieView&, const DecodeConfig& config) {
  const int64_t hidden_pad = padded(heads.hidden_dim);
  int64_t widest = 0;
  for (int l = 0; l < heads.num_levels; ++l)
    widest = std::max<int64_t>(widest, heads.heads[l].num_codes);
  const size_t beams =
      float_bytes(config.num_beams) + arena_bytes(config.num_beams * sizeof(int32_t)) +
      arena_bytes(static_cast<size_t>(config.num_beams) * kMaxLevels * sizeof(int16_t));
  return float_bytes(kMaxBlock * heads.num_levels * hidden_pad) +
         2 * float_bytes(kMaxBlock * hidden_pad) + 2 * float_bytes(kMaxBlock * padded(widest)) +
         float_bytes(padded(widest)) +
         arena_bytes(selector_capacity(config.num_beams) * sizeof(BeamKey)) + 2 * beams;
}

size_t level_logits_bytes(const HeadsView& heads, int level) {
  return 2 * float_bytes(kMaxBlock * padded(heads.hidden_dim)) +
         float_bytes(kMaxBlock * padded(heads.heads[level].num_codes));
}

}  // namespace sidmlp::cpu

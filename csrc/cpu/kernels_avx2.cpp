// The CPU kernels compiled for one instruction set: avx2.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/kernels_isa.h"
#include "cpu/selection.h"
#include "cpu/simd_avx2.h"

namespace sidmlp::cpu::avx2 {
#include "cpu/linear_algebra.inl"

// The others are written on it.
#include "cpu/beam.inl"
#include "cpu/gemm_panels.inl"
#include "cpu/readout.inl"
// After the readout, for its mean.
#include "cpu/mlp_encoder.inl"
#include "cpu/t5_encoder.inl"

const Kernels kKernels = {"avx2",       context_readout, beam_decode,
                          level_logits, encode_t5,       encode_mlp};
}  // namespace sidmlp::cpu::avx2

// The CPU kernels compiled for one instruction set: avx512.
#include <cmath>
#include <cstring>

#include "cpu/kernels_isa.h"
#include "cpu/selection.h"
#include "cpu/simd_avx512.h"

namespace sidmlp::cpu::avx512 {
#include "cpu/linear_algebra.inl"

// The other two are written on it.
#include "cpu/beam.inl"
#include "cpu/readout.inl"

const Kernels kKernels = {"avx512", context_readout, beam_decode, level_logits};
}  // namespace sidmlp::cpu::avx512

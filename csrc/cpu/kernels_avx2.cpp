// The CPU kernels compiled for one instruction set: avx2.
#include <cmath>
#include <cstring>

#include "cpu/kernels_isa.h"
#include "cpu/selection.h"
#include "cpu/simd_avx2.h"

namespace sidmlp::cpu::avx2 {
#include "cpu/linear_algebra.inl"

// The other two are written on it.
#include "cpu/beam.inl"
#include "cpu/readout.inl"

const Kernels kKernels = {"avx2", context_readout, beam_decode, level_logits};
}  // namespace sidmlp::cpu::avx2

// context_readout with bf16 weights.
#include "cuda/sm90/context_readout.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* context_readout_bf16() {
  return reinterpret_cast<const void*>(&context_readout_sm90_kernel<__nv_bfloat16>);
}

}  // namespace sidmlp::cuda::sm90

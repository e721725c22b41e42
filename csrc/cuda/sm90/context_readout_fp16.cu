// context_readout with fp16 weights.
#include "cuda/sm90/context_readout.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* context_readout_fp16() {
  return reinterpret_cast<const void*>(&context_readout_sm90_kernel<__half>);
}

}  // namespace sidmlp::cuda::sm90

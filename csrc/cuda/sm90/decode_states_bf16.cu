// decode_states with bf16 weights.
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* decode_states_bf16(int hidden, int resident) {
  return kernel_of<__nv_bfloat16, true>(hidden, resident);
}

}  // namespace sidmlp::cuda::sm90

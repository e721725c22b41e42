// decode_states with fp16 weights.
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* decode_states_fp16(int hidden, int resident) {
  return kernel_of<__half, true>(hidden, resident);
}

}  // namespace sidmlp::cuda::sm90

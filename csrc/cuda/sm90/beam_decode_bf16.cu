// beam_decode with bf16 weights.
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* beam_decode_bf16(int hidden, int resident) {
  return kernel_of<__nv_bfloat16, false>(hidden, resident);
}

}  // namespace sidmlp::cuda::sm90

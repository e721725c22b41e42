// beam_decode with fp16 weights.
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* beam_decode_fp16(int hidden, int resident) {
  return kernel_of<__half, false>(hidden, resident);
}

}  // namespace sidmlp::cuda::sm90

// encode_t5 for long requests with fp16 weights.
#include "cuda/sm90/encoder/long_kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* long_fp16(int dim, Activation activation) {
  return long_kernel_of<__half>(dim, activation);
}

}  // namespace sidmlp::cuda::sm90

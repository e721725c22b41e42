// encode_t5 for long requests with bf16 weights, and what both dtypes share.
#include "cuda/sm90/encoder/long_kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* long_bf16(int dim, Activation activation) {
  return long_kernel_of<__nv_bfloat16>(dim, activation);
}

int long_shared_bytes() { return static_cast<int>(sizeof(LongShared)); }

}  // namespace sidmlp::cuda::sm90

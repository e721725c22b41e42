// encode_t5 by wgmma with bf16 weights, and what both dtypes share.
#include "cuda/sm90/encoder/wide.cuh"

namespace sidmlp::cuda::sm90 {

const void* wide_bf16(Activation activation) { return wide_kernel_of<__nv_bfloat16>(activation); }

int wide_shared_bytes(const EncodeT5Problem& problem) {
  return static_cast<int>(sizeof(WideShared)) +
         4 * problem.model.num_heads * (2 * problem.tokens.tokens - 1);
}

}  // namespace sidmlp::cuda::sm90

// encode_t5 with bf16 weights.
#include "cuda/sm90/encoder/kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* encode_t5_bf16(int head_dim) { return encode_kernel_of<__nv_bfloat16>(head_dim); }

}  // namespace sidmlp::cuda::sm90

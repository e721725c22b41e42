// encode_t5 with fp16 weights.
#include "cuda/sm90/encoder/kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* encode_t5_fp16(int head_dim) { return encode_kernel_of<__half>(head_dim); }

}  // namespace sidmlp::cuda::sm90

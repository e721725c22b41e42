// encode_t5 by wgmma with fp16 weights.
#include "cuda/sm90/encoder/wide.cuh"

namespace sidmlp::cuda::sm90 {

const void* wide_fp16(Activation activation) { return wide_kernel_of<__half>(activation); }

}  // namespace sidmlp::cuda::sm90

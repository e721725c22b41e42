// encode_mlp with fp16 weights.
#include "cuda/sm90/mlp_encoder/kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* encode_mlp_fp16() { return reinterpret_cast<const void*>(&encode_mlp_kernel<__half>); }

}  // namespace sidmlp::cuda::sm90

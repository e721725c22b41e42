// encode_mlp with fp32 weights.
#include "cuda/sm90/mlp_encoder/kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* encode_mlp_fp32() { return reinterpret_cast<const void*>(&encode_mlp_kernel<float>); }

}  // namespace sidmlp::cuda::sm90

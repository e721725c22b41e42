// encode_mlp with bf16 weights.
#include "cuda/sm90/mlp_encoder/kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* encode_mlp_bf16() {
  return reinterpret_cast<const void*>(&encode_mlp_kernel<__nv_bfloat16>);
}

}  // namespace sidmlp::cuda::sm90

// The first stage of a decode in two launches, with bf16 weights.
#include "cuda/sm90/first_stage.cuh"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

const void* first_stage_bf16(int hidden, bool states) {
  return states ? first_stage_kernel_of<__nv_bfloat16, true>(hidden)
                : first_stage_kernel_of<__nv_bfloat16, false>(hidden);
}

}  // namespace sidmlp::cuda::sm90

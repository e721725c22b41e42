// beam_decode and decode_states of many beams or codes with bf16 weights.
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/wide_kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* decode_wide_bf16(int hidden) { return wide_kernel_of<__nv_bfloat16>(hidden); }

}  // namespace sidmlp::cuda::sm90

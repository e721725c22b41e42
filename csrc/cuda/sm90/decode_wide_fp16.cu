// beam_decode and decode_states of many beams or codes with fp16 weights.
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/wide_kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* decode_wide_fp16(int hidden) { return wide_kernel_of<__half>(hidden); }

}  // namespace sidmlp::cuda::sm90

// The kernels for bf16 weights.
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* kernel_bf16(int vectors) {
  switch (vectors) {
    case 1:
      return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<__nv_bfloat16, 1>);
    case 2:
      return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<__nv_bfloat16, 2>);
    case 4:
      return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<__nv_bfloat16, 4>);
    default:
      return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<__nv_bfloat16, 8>);
  }
}

}  // namespace sidmlp::cuda::sm90

// encode_t5 by wgmma with fp16 weights.
#include "cuda/sm90/encoder/wide.cuh"

namespace sidmlp::cuda::sm90 {

const void* wide_fp16() {
  return reinterpret_cast<const void*>(&encode_t5_wide_kernel<__half>);
}

}  // namespace sidmlp::cuda::sm90

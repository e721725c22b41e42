// encode_t5 by wgmma for few requests with fp16 weights.
#include "cuda/sm90/encoder/split_kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* split_fp16(Activation activation, int blocks) {
  return split_kernel_of<__half>(activation, blocks);
}

}  // namespace sidmlp::cuda::sm90

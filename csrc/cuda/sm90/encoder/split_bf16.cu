// encode_t5 by wgmma for few requests with bf16 weights, and what both dtypes share.
#include "cuda/sm90/encoder/split_kernel.cuh"

namespace sidmlp::cuda::sm90 {

const void* split_bf16(Activation activation, int blocks) {
  return split_kernel_of<__nv_bfloat16>(activation, blocks);
}

int split_shared_bytes(const EncodeT5Problem& problem, int blocks) {
  switch (blocks) {
    case 8:
      return split_shared_bytes_of<8>(problem);
    case 4:
      return split_shared_bytes_of<4>(problem);
    case 2:
      return split_shared_bytes_of<2>(problem);
    default:
      return split_shared_bytes_of<1>(problem);
  }
}

}  // namespace sidmlp::cuda::sm90

// The levels' launch of a decode in two: what the launch before it left (first_stage_shape.h) for
// the requests of a block -> shared memory, where the one launch computes it.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/dependent.cuh"
#include "cuda/sm90/group.cuh"
#include "cuda/sm90/products.cuh"

namespace sidmlp::cuda::sm90 {

// Waits for that launch; ends with a barrier. Rows are multiples of 16 bytes.
__device__ __forceinline__ void take_first_stage(const Group& group, int64_t batch, int64_t begin,
                                                 int width, const char* workspace) {
  const auto* firsts = reinterpret_cast<const float*>(workspace);
  const float* logits = firsts + batch * width;
  const int stride = group.shape.root_stride;
  ptx::wait_for_last_launch();
  for (int slot = 0; slot < group.shape.users; ++slot) {
    const int request = group.request_of(slot);
    if (request >= group.requests) break;
    const float* first = firsts + (begin + request) * width;
    const uint32_t to = ptx::shared_address(group.first(slot, width));
    for (int i = 4 * static_cast<int>(threadIdx.x); i < width; i += 4 * kThreads)
      ptx::copy_piece(to + 4 * i, first + i);
    const float* row = logits + (begin + request) * stride;
    const uint32_t root = ptx::shared_address(group.root_logits(slot));
    for (int i = 4 * static_cast<int>(threadIdx.x); i < stride; i += 4 * kThreads)
      ptx::copy_piece(root + 4 * i, row + i);
  }
  ptx::wait_copies();
  __syncthreads();
}

}  // namespace sidmlp::cuda::sm90

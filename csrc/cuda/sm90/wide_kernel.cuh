// beam_decode and decode_states for up to kMaxBeams beams and kMaxCodes codes a level, one launch:
// as kernel.cuh, but a block has one request and a multiprocessor to itself.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/wide_beam.cuh"
#include "cuda/sm90/wide_group.cuh"

namespace sidmlp::cuda::sm90 {

template <class W, int kVectors, bool kFull>
__global__ void __launch_bounds__(kThreads, 1)
    wide_decode_sm90_kernel(const __grid_constant__ BeamDecodeProblem problem,
                            const __grid_constant__ Shape shape, char* workspace) {
  extern __shared__ __align__(128) char memory[];
  __shared__ WideState state;
  static_assert(sizeof(WideState) <= kFixed, "beside the dynamic shared memory");
  ptx::cluster_arrive();  // no block writes to another before that one has begun
  const HeadsView& heads = problem.heads;
  const int tid = static_cast<int>(threadIdx.x), width = heads.num_levels * heads.hidden_dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x >> shape.cluster_shift) * shape.group;
  const int requests =
      static_cast<int>(min(static_cast<int64_t>(shape.group), problem.batch - begin));
  const Group group{shape, memory, ptx::cluster_rank(), requests};

  if (problem.context != nullptr) {
    group_contexts<W, false>(problem, group, begin, state.sums, workspace);
  } else {
    group_contexts<W, true>(problem, group, begin, state.sums, workspace);
  }
  for (int i = tid; i < kBins; i += kThreads)
    reinterpret_cast<uint32_t*>(memory + shape.bins)[i] = 0;
  if (tid == 0) state.top.placed = 0;
  context_parts<W>(heads, group);
  cluster_barrier();
  root_rows<W, kVectors, kFull>(heads, group);
  if (shape.group == 1) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  wide_root_logits<W>(heads, group);
  cluster_barrier();

  const int request = group.request_of(0);
  WideSearch<W, kVectors, kFull> search{problem, shape,       memory,
                                        state,   group.block, group.first(0, width)};
  search.run(request < requests ? begin + request : -1, group.root_logits(0));
}

// The published width has a kernel of its own, whose strides and trip counts the compiler knows.
template <class W>
const void* wide_kernel_of(int hidden) {
  const void* kernels[] = {reinterpret_cast<const void*>(&wide_decode_sm90_kernel<W, 2, true>),
                           reinterpret_cast<const void*>(&wide_decode_sm90_kernel<W, 2, false>),
                           reinterpret_cast<const void*>(&wide_decode_sm90_kernel<W, 4, false>),
                           reinterpret_cast<const void*>(&wide_decode_sm90_kernel<W, 8, false>)};
  if (hidden == 512) return kernels[0];
  return kernels[hidden <= 512 ? 1 : hidden <= 1024 ? 2 : 3];
}

}  // namespace sidmlp::cuda::sm90

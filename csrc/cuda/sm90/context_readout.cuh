// context_readout for compute capability 9.0, half-precision weights: what decode_states does with
// states (readout.cuh), with the contexts as its result.
#pragma once

#include "cuda/problem.h"
#include "cuda/sm90/readout.cuh"

namespace sidmlp::cuda::sm90 {

template <class W>
__global__ void __launch_bounds__(kThreads, 2)
    context_readout_sm90_kernel(const __grid_constant__ ContextReadoutProblem problem,
                                const __grid_constant__ ReadoutShape shape) {
  extern __shared__ __align__(128) char memory[];
  ptx::cluster_arrive();  // no block writes to another before that one has begun
  const int64_t begin = static_cast<int64_t>(blockIdx.x >> shape.cluster_shift) * shape.group;
  const int requests =
      static_cast<int>(min(static_cast<int64_t>(shape.group), problem.batch - begin));
  Readout<W>{problem.readout, problem.states, shape, memory, ptx::cluster_rank(), begin, requests}
      .run(nullptr, 0, problem.context);
}

}  // namespace sidmlp::cuda::sm90

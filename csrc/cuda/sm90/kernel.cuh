// beam_decode and decode_states for compute capability 9.0, half-precision weights: one launch.
//
//   cluster of blocks, a group of requests        block (or team of blocks), one request at a time
//   contexts -> first layers of all heads         cut level 1 -> level 2 -> .. -> level L -> items
//            -> hidden rows -> logits of level 1
//
// Blocks of 256 threads, two on a multiprocessor.
#pragma once

#include "cuda/sm90/beam.cuh"
#include "cuda/sm90/group.cuh"

namespace sidmlp::cuda::sm90 {

__device__ __forceinline__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

template <class W, int kVectors, bool kFull>
__global__ void __launch_bounds__(kThreads, kVectors <= 4 ? 2 : 1)
    beam_decode_sm90_kernel(const __grid_constant__ BeamDecodeProblem problem,
                            const __grid_constant__ Shape shape) {
  extern __shared__ __align__(128) char memory[];
  __shared__ BeamState state;
  ptx::cluster_arrive();  // no block writes to another before that one has begun
  const HeadsView& heads = problem.heads;
  const int tid = static_cast<int>(threadIdx.x), width = heads.num_levels * heads.hidden_dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x >> shape.cluster_shift) * shape.group;
  const int requests =
      static_cast<int>(min(static_cast<int64_t>(shape.group), problem.batch - begin));
  const Group group{shape, memory, ptx::cluster_rank(), requests};

  for (int i = tid; i < kBins; i += kThreads)
    reinterpret_cast<uint32_t*>(memory + shape.bins)[i] = 0;
  if (tid == 0) state.num_survivors = 0;
  for (int i = 4 * tid; i < requests * heads.dim; i += 4 * kThreads) {
    const int request = i / heads.dim, column = i % heads.dim;
    const float4 x = *reinterpret_cast<const float4*>(problem.context + begin * heads.dim + i);
    *reinterpret_cast<uint2*>(memory + shape.contexts + request * shape.context_bytes +
                              2 * column) = {narrow_two<W>(x.x, x.y), narrow_two<W>(x.z, x.w)};
  }
  __syncthreads();
  ptx::cluster_wait();

  if (shape.group <= 8) {
    context_parts<W, 1>(heads, group);
  } else {
    context_parts<W, 2>(heads, group);
  }
  cluster_barrier();
  root_rows<W, kVectors, kFull>(heads, group);
  if (shape.group == 1) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  root_logits<W>(heads, group);
  cluster_barrier();

  for (int slot = 0; slot < shape.users; ++slot) {
    const int request = group.request_of(slot);
    Search<W, kVectors, kFull> search{problem,     shape, memory, state, group.block,
                               group.first(slot, width)};
    search.run(request < requests ? begin + request : -1, group.root_logits(slot));
  }
  if (shape.team_shift > 0) cluster_barrier();  // others may still store keys here
}

// The published width has a kernel of its own, whose strides and trip counts the compiler knows.
template <class W>
const void* kernel_of(int hidden) {
  if (hidden == 512) return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 2, true>);
  if (hidden <= 256) return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 1, false>);
  if (hidden <= 512) return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 2, false>);
  if (hidden <= 1024) return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 4, false>);
  return reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 8, false>);
}

}  // namespace sidmlp::cuda::sm90

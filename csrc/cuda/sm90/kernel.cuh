// beam_decode and decode_states for compute capability 9.0, half-precision weights: one launch.
//
//   cluster of blocks, a group of requests        block (or team of blocks), one request at a time
//   states -> contexts (decode_states)
//   contexts -> first layers of all heads         cut level 1 -> level 2 -> .. -> level L -> items
//            -> hidden rows -> logits of level 1
//
// Blocks of 256 threads, two on a multiprocessor; one where H is above 1024.
//
// In two launches (first_stage.cuh) the contexts' kernel takes what the first left in `workspace`,
// and begins with the levels.
#pragma once

#include "cuda/launch.h"
#include "cuda/readout.cuh"
#include "cuda/sm90/beam.cuh"
#include "cuda/sm90/group.cuh"
#include "cuda/sm90/readout.cuh"
#include "cuda/sm90/take_first_stage.cuh"

namespace sidmlp::cuda::sm90 {

// Contexts of the group, from the caller or from its states -> shared memory of every block. While
// states are read, the arrays of the levels are not in use yet. Sizes that readout.cuh of this
// folder does not take have the plain kernel's readout, a block per request.
template <class W, bool kStates>
__device__ __forceinline__ void group_contexts(const BeamDecodeProblem& problem, const Group& group,
                                               int64_t begin, int* warp_counts, char* workspace) {
  const Shape& shape = group.shape;
  const int dim = problem.heads.dim, tid = static_cast<int>(threadIdx.x);
  char* rows = group.memory + shape.contexts;
  if constexpr (!kStates) {
    const float* context = problem.context + begin * dim;  // at any address
    for (int i = 2 * tid; i < group.requests * dim; i += 2 * kThreads) {
      const int request = i / dim, column = i % dim;
      *reinterpret_cast<uint32_t*>(rows + request * shape.context_bytes + 2 * column) =
          narrow_two<W>(__ldg(context + i), __ldg(context + i + 1));
    }
    __syncthreads();
    ptx::cluster_wait();
  } else if (shape.tensor_core_readout) {
    Readout<W>{problem.readout, problem.states, shape.readout, group.memory + shape.hidden,
               group.block,     begin,          group.requests}
        .run(rows, shape.context_bytes, nullptr);
  } else {
    const ContextReadoutLayout& layout = shape.plain_readout;
    const Memory scratch{group.memory + shape.hidden,
                         workspace + (blockIdx.x >> shape.team_shift) * layout.footprint.workspace};
    auto* context = scratch.at<float>(layout.context);
    ptx::cluster_wait();
    // Blocks that will hold different requests read them out.
    const int first = static_cast<int>(group.block) >> shape.team_shift;
    const bool reads = (static_cast<int>(group.block) & ((1 << shape.team_shift) - 1)) == 0;
    for (int request = first; reads && request < group.requests;
         request += shape.cluster >> shape.team_shift) {
      context_readout<W>(problem.readout, problem.states, begin + request, scratch, layout.readout,
                         scratch.at<float4>(layout.partial), warp_counts, context);
      for (int i = 2 * tid; i < dim; i += 2 * kThreads) {
        const uint32_t word = narrow_two<W>(context[i], context[i + 1]);
        for (int to = 0; to < shape.cluster; ++to)
          ptx::store_peer(ptx::peer_address(rows + request * shape.context_bytes + 2 * i,
                                            static_cast<uint32_t>(to)),
                          word);
      }
      __syncthreads();
    }
    cluster_barrier();
  }
}

template <class W, int kVectors, bool kFull, bool kStates, int kResident>
__global__ void __launch_bounds__(kThreads, kResident)
    beam_decode_sm90_kernel(const __grid_constant__ BeamDecodeProblem problem,
                            const __grid_constant__ Shape shape, char* workspace) {
  extern __shared__ __align__(128) char memory[];
  __shared__ BeamState state;
  ptx::cluster_arrive();  // no block writes to another before that one has begun
  const HeadsView& heads = problem.heads;
  const int tid = static_cast<int>(threadIdx.x), width = heads.num_levels * heads.hidden_dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x >> shape.cluster_shift) * shape.group;
  const int requests =
      static_cast<int>(min(static_cast<int64_t>(shape.group), problem.batch - begin));
  const Group group{shape, memory, ptx::cluster_rank(), requests};

  const bool ready = !kStates && workspace != nullptr;
  if (!ready) group_contexts<W, kStates>(problem, group, begin, state.heads, workspace);
  for (int i = tid; i < kBins; i += kThreads)
    reinterpret_cast<uint32_t*>(memory + shape.bins)[i] = 0;
  if (tid == 0) state.num_survivors = 0;
  if (ready) {
    ptx::cluster_wait();
    take_first_stage(group, problem.batch, begin, width, workspace);
  } else {
    context_parts<W>(heads, group);
    cluster_barrier();
    root_rows<W, kVectors, kFull>(heads, group);
    if (shape.group == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
    root_logits<W>(heads, group);
    cluster_barrier();
  }

  for (int slot = 0; slot < shape.users; ++slot) {
    const int request = group.request_of(slot);
    const Search<W, kVectors, kFull, kFull && kResident == 1> search{problem, shape,       memory,
                                                                     state,   group.block, slot};
    search.run(request < requests ? begin + request : -1, group.root_logits(slot));
  }
  if (shape.team_shift > 0) cluster_barrier();  // others may still store keys here
}

// The published width has kernels of its own, whose strides and trip counts the compiler knows, and
// of these one for a block that has a multiprocessor to itself.
template <class W, bool kStates>
const void* kernel_of(int hidden, int resident) {
  const void* kernels[] = {
      reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 2, true, kStates, 1>),
      reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 2, true, kStates, 2>),
      reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 2, false, kStates, 2>),
      reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 4, false, kStates, 2>),
      reinterpret_cast<const void*>(&beam_decode_sm90_kernel<W, 8, false, kStates, 1>)};
  if (hidden == 512) return kernels[resident == 1 ? 0 : 1];
  return kernels[hidden <= 512 ? 2 : hidden <= 1024 ? 3 : 4];
}

}  // namespace sidmlp::cuda::sm90

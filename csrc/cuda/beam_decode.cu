// beam_decode and decode_states: one launch. Half-precision sizes that csrc/cuda/sm90 takes go
// there; this file has the plain kernel, a block of kThreads per request.
//
//   shared memory (csrc/cuda/layout.h), largest of the published size (D 128, H 512, C 256, L 4,
//   50 beams): hidden rows 32 KB, partial sums 16 KB, logits 16 KB, first layers 8 KB, keys 4 KB
//
// The plain form, for every size: thought bound (not profiled) by dependent loads and barriers, of
// which two blocks of a multiprocessor hide some of each other's.
#include <algorithm>
#include <climits>

#include "cuda/beam.cuh"
#include "cuda/launch.h"
#include "cuda/launch_shape.h"
#include "cuda/readout.cuh"

namespace sidmlp::cuda {

namespace {

template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    beam_decode_kernel(const __grid_constant__ BeamDecodeProblem problem,
                       const __grid_constant__ BeamDecodeLayout layout, char* workspace) {
  extern __shared__ __align__(16) char shared[];
  __shared__ BeamState state;
  const Memory memory{shared, workspace + blockIdx.x * layout.footprint.workspace};
  place_arrays(layout, memory, state);
  auto* context = memory.at<float>(layout.context);
  for (int64_t request = blockIdx.x; request < problem.batch; request += gridDim.x) {
    if (problem.context == nullptr) {
      context_readout<W>(problem.readout, problem.states, request, memory, layout.readout,
                         memory.at<float4>(layout.partial), state.warp_counts, context);
    } else {
      const int dim = problem.heads.dim;
      for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads)
        context[i] = problem.context[request * dim + i];
      __syncthreads();
    }
    beam_decode_request<W>(problem, layout, request, context, state);
  }
}

const void* kernel_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return reinterpret_cast<const void*>(&beam_decode_kernel<float>);
    case DType::kBFloat16:
      return reinterpret_cast<const void*>(&beam_decode_kernel<__nv_bfloat16>);
    case DType::kFloat16:
      return reinterpret_cast<const void*>(&beam_decode_kernel<__half>);
  }
  return nullptr;
}

BeamDecodeLayout layout_of(const BeamDecodeProblem& problem) {
  constexpr int64_t kLogits = 4096;  // 16 KB; a chunk takes as many beams as fit
  const HeadsView& heads = problem.heads;
  const int64_t hidden_pad = padded(heads.hidden_dim), num_beams = problem.config.num_beams;
  int64_t widest = 0;
  for (int l = 0; l < heads.num_levels; ++l)
    widest = std::max<int64_t>(widest, heads.heads[l].num_codes);

  BeamDecodeLayout layout{};
  LayoutBuilder builder;
  layout.partial = builder.take<float>(partial_floats());
  layout.context = builder.take<float>(padded(heads.dim));
  const LayoutBuilder::Mark mark = builder.mark();
  if (problem.context == nullptr) {
    layout.readout = readout_layout(problem.readout, problem.states.tokens, builder);
    builder.rewind(mark);  // the beams take the readout's place
  }
  layout.first = builder.take<float>(heads.num_levels * hidden_pad);
  layout.key_capacity = 2 * kThreads;
  while (layout.key_capacity < 2 * num_beams || layout.key_capacity < num_beams + kThreads)
    layout.key_capacity *= 2;
  layout.keys = builder.take<BeamKey>(layout.key_capacity);
  layout.first_child = builder.take<int32_t>(num_beams);
  layout.children = builder.take<int32_t>(num_beams);
  layout.active = builder.take<int32_t>(num_beams);
  for (BeamsLayout& beams : layout.beams) {
    beams.score = builder.take<float>(num_beams);
    beams.node = builder.take<int32_t>(num_beams);
    beams.codes = builder.take<int16_t>(num_beams * heads.num_levels);
  }
  layout.logit_capacity = std::max(kLogits, padded(widest));
  layout.logits = builder.take<float>(layout.logit_capacity);
  layout.heads = heads_layout(heads, num_beams, builder);
  layout.footprint = footprint_of(builder);
  return layout;
}

}  // namespace

cudaError_t prepare(BeamDecode& op) {
  if (op.launches == 2) {
    if (sm90::two_launches_why_not(op.problem) != nullptr) return cudaErrorNotSupported;
    op.tensor_cores = true;
    op.first_stage = sm90::first_stage_shape(op.problem);
    op.tensor_core = sm90::shape_of(op.problem, 2);
    const int64_t blocks = sm90::num_blocks(op.problem, op.tensor_core);
    if (std::max(blocks, sm90::num_blocks(op.problem, op.first_stage)) > INT_MAX)
      return cudaErrorInvalidConfiguration;
    op.shape = {static_cast<int>(blocks), sm90::first_stage_bytes(op.problem, op.first_stage)};
    return cudaSuccess;
  }
  op.tensor_cores = sm90::why_not(op.problem) == nullptr;
  if (op.tensor_cores) {
    op.tensor_core = sm90::shape_of(op.problem);
    const int64_t blocks = sm90::num_blocks(op.problem, op.tensor_core);
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    // One block of a team reads states.
    const int64_t readers = blocks >> op.tensor_core.team_shift;
    op.shape = {static_cast<int>(blocks),
                readers * op.tensor_core.plain_readout.footprint.workspace};
    return cudaSuccess;
  }
  op.layout = layout_of(op.problem);
  return shape_launch(kernel_of(op.problem.heads.dtype), op.layout.footprint, op.problem.batch,
                      op.shape);
}

cudaError_t launch(const BeamDecode& op, void* workspace, cudaStream_t stream) {
  if (op.launches == 2)
    return sm90::launch(op.problem, op.first_stage, op.tensor_core, workspace, stream);
  if (op.tensor_cores) return sm90::launch(op.problem, op.tensor_core, workspace, stream);
  return launch_kernel(kernel_of(op.problem.heads.dtype), op.problem, op.layout, op.shape,
                       workspace, stream);
}

}  // namespace sidmlp::cuda

// level_logits: contexts and prefixes -> logits of every code of one level, a block of kThreads per
// row. For tests and rescoring; the functions are those of the decode.
#include "cuda/heads.cuh"
#include "cuda/launch.h"
#include "cuda/launch_shape.h"

namespace sidmlp::cuda {

namespace {

template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    level_logits_kernel(const __grid_constant__ LevelLogitsProblem problem,
                        const __grid_constant__ LevelLogitsLayout layout, char* workspace) {
  extern __shared__ __align__(16) char shared[];
  const Memory memory{shared, workspace + blockIdx.x * layout.footprint.workspace};
  auto* partial = memory.at<float4>(layout.partial);
  auto* first = memory.at<float>(layout.first);
  auto* hidden = memory.at<float>(layout.heads.hidden);
  auto* next = memory.at<float>(layout.heads.next);
  const int level = problem.level;
  const HeadsView& heads = problem.heads;
  const HeadView& head = heads.heads[level];

  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const int32_t* codes = problem.prefix_codes + row * level;
    float* logits = problem.logits + row * head.num_codes;
    bool in_range = true;
    for (int j = 0; j < level; ++j)
      in_range = in_range && codes[j] >= 0 && codes[j] < heads.heads[j].num_codes;
    if (!in_range) {
      for (int c = static_cast<int>(threadIdx.x); c < head.num_codes; c += kThreads)
        logits[c] = NAN;
      continue;
    }
    context_part<W>(heads, level, 1, problem.context + row * heads.dim, partial, first);
    if (warp_index() == 0) warp_first_layer<W>(heads, level, first, codes, hidden);
    __syncthreads();
    const float* top = further_blocks<W>(heads, head, 1, hidden, next, partial);
    for (int at = 4 * warp_index(); at < head.num_codes; at += 4 * kWarps) {
      warp_logits<W>(heads, head, top, at, head.num_codes, [](int c) { return c; }, logits + at);
    }
    __syncthreads();
  }
}

const void* kernel_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return reinterpret_cast<const void*>(&level_logits_kernel<float>);
    case DType::kBFloat16:
      return reinterpret_cast<const void*>(&level_logits_kernel<__nv_bfloat16>);
    case DType::kFloat16:
      return reinterpret_cast<const void*>(&level_logits_kernel<__half>);
  }
  return nullptr;
}

}  // namespace

cudaError_t prepare(LevelLogits& op) {
  const LevelLogitsProblem& problem = op.problem;
  LayoutBuilder builder;
  op.layout.partial = builder.take<float>(partial_floats());
  op.layout.first = builder.take<float>(padded(problem.heads.hidden_dim));
  op.layout.heads = heads_layout(problem.heads, 1, builder);
  op.layout.footprint = footprint_of(builder);
  return shape_launch(kernel_of(problem.heads.dtype), op.layout.footprint, problem.rows, op.shape);
}

cudaError_t launch(const LevelLogits& op, void* workspace, cudaStream_t stream) {
  return launch_kernel(kernel_of(op.problem.heads.dtype), op.problem, op.layout, op.shape,
                       workspace, stream);
}

}  // namespace sidmlp::cuda

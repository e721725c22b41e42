// context_readout: encoder states -> context vectors. Half-precision sizes that csrc/cuda/sm90
// takes go there; this file has the plain kernel, a block of kThreads per request.
#include <climits>

#include "cuda/launch.h"
#include "cuda/launch_shape.h"
#include "cuda/readout.cuh"

namespace sidmlp::cuda {

namespace {

template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    context_readout_kernel(const __grid_constant__ ContextReadoutProblem problem,
                           const __grid_constant__ ContextReadoutLayout layout, char* workspace) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int warp_counts[kWarps];
  const Memory memory{shared, workspace + blockIdx.x * layout.footprint.workspace};
  auto* context = memory.at<float>(layout.context);
  const int dim = problem.readout.dim;
  for (int64_t request = blockIdx.x; request < problem.batch; request += gridDim.x) {
    context_readout<W>(problem.readout, problem.states, request, memory, layout.readout,
                       memory.at<float4>(layout.partial), warp_counts, context);
    for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads)
      problem.context[request * dim + i] = context[i];
    __syncthreads();
  }
}

const void* kernel_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return reinterpret_cast<const void*>(&context_readout_kernel<float>);
    case DType::kBFloat16:
      return reinterpret_cast<const void*>(&context_readout_kernel<__nv_bfloat16>);
    case DType::kFloat16:
      return reinterpret_cast<const void*>(&context_readout_kernel<__half>);
  }
  return nullptr;
}

}  // namespace

cudaError_t prepare(ContextReadout& op) {
  const ContextReadoutProblem& problem = op.problem;
  const sm90::ReadoutSizes sizes = sm90::sizes_of(problem.readout);
  op.tensor_cores = sm90::reads_on_tensor_cores(sizes);
  if (op.tensor_cores) {
    op.tensor_core =
        sm90::readout_shape(sizes, problem.states.tokens, sm90::cut_of_batch(problem.batch));
    const int64_t blocks = sm90::num_blocks(problem, op.tensor_core);
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    op.shape = {static_cast<int>(blocks), 0};
    return cudaSuccess;
  }
  LayoutBuilder builder;
  op.layout.partial = builder.take<float>(partial_floats());
  op.layout.context = builder.take<float>(padded(problem.readout.dim));
  op.layout.readout = readout_layout(problem.readout, problem.states.tokens, builder);
  op.layout.footprint = footprint_of(builder);
  return shape_launch(kernel_of(problem.readout.dtype), op.layout.footprint, problem.batch,
                      op.shape);
}

cudaError_t launch(const ContextReadout& op, void* workspace, cudaStream_t stream) {
  if (op.tensor_cores) return sm90::launch(op.problem, op.tensor_core, stream);
  return launch_kernel(kernel_of(op.problem.readout.dtype), op.problem, op.layout, op.shape,
                       workspace, stream);
}

}  // namespace sidmlp::cuda

#include "cuda/sm90/launch.h"

#include "cuda/problem.h"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, void* workspace,
                   cudaStream_t stream) {
  const int hidden = problem.heads.hidden_dim;
  const bool bf16 = problem.heads.dtype == DType::kBFloat16;
  const auto kernel_of = problem.context != nullptr
                             ? (bf16 ? beam_decode_bf16 : beam_decode_fp16)
                             : (bf16 ? decode_states_bf16 : decode_states_fp16);
  const void* kernel = kernel_of(hidden, shape.resident);
  // Always the same number: another thread may launch the same kernel with more meanwhile.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOneBlock - kFixed);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks(problem, shape)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<BeamDecodeProblem*>(&problem), const_cast<Shape*>(&shape),
                       &workspace};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace sidmlp::cuda::sm90

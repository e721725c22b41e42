#include "cuda/sm90/launch.h"

#include "cuda/problem.h"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

namespace {

cudaError_t launch_clusters(const void* kernel, int cluster, int64_t blocks, int shared_bytes,
                            void** arguments, cudaStream_t stream) {
  // Always the same number: another thread may launch the same kernel with more meanwhile.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOneBlock - kFixed);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace

cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, void* workspace,
                   cudaStream_t stream) {
  const int hidden = problem.heads.hidden_dim;
  const bool bf16 = problem.heads.dtype == DType::kBFloat16;
  const auto kernel_of = problem.context != nullptr
                             ? (bf16 ? beam_decode_bf16 : beam_decode_fp16)
                             : (bf16 ? decode_states_bf16 : decode_states_fp16);
  void* arguments[] = {const_cast<BeamDecodeProblem*>(&problem), const_cast<Shape*>(&shape),
                       &workspace};
  const void* kernel = shape.wide ? (bf16 ? decode_wide_bf16 : decode_wide_fp16)(hidden)
                                  : kernel_of(hidden, shape.resident);
  return launch_clusters(kernel, shape.cluster, num_blocks(problem, shape), shape.shared_bytes,
                         arguments, stream);
}

cudaError_t launch(const ContextReadoutProblem& problem, const ReadoutShape& shape,
                   cudaStream_t stream) {
  const bool bf16 = problem.readout.dtype == DType::kBFloat16;
  void* arguments[] = {const_cast<ContextReadoutProblem*>(&problem),
                       const_cast<ReadoutShape*>(&shape)};
  return launch_clusters(bf16 ? context_readout_bf16() : context_readout_fp16(),
                         1 << shape.cluster_shift, num_blocks(problem, shape), shape.bytes,
                         arguments, stream);
}

}  // namespace sidmlp::cuda::sm90

// Launches of kernels whose blocks form clusters.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/layout.h"

namespace sidmlp::cuda {

// `blocks` in all, `cluster` of them in each cluster. most_shared: what static shared memory
// leaves. Always the same for a kernel: another thread may launch it with more shared_bytes
// meanwhile.
inline cudaError_t launch_kernel(const void* kernel, void** arguments, int blocks, int threads,
                                 int cluster, int shared_bytes, cudaStream_t stream,
                                 int most_shared = kOneBlock) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace sidmlp::cuda

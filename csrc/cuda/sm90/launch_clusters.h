// Launches of kernels whose blocks form clusters.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sidmlp::cuda::sm90 {

// `blocks` in all, `cluster` of them in each cluster. most_shared: the most dynamic shared memory
// of any launch of this kernel, since another thread may launch it with more meanwhile.
inline cudaError_t launch_clusters(const void* kernel, void** arguments, int cluster,
                                   int64_t blocks, int threads, int shared_bytes, int most_shared,
                                   cudaStream_t stream) {
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

}  // namespace sidmlp::cuda::sm90

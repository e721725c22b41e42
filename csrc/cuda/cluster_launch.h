// Launches of kernels whose blocks form clusters.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/layout.h"

namespace sidmlp::cuda {

// Of the current device, 0 if it does not say.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count;
}

// `blocks` in all, `cluster` of them in each cluster. most_shared: what static shared memory
// leaves. Always the same for a kernel: another thread may launch it with more shared_bytes
// meanwhile. early: blocks may begin before the kernel before them in the stream has ended, and
// wait for it themselves (griddepcontrol).
inline cudaError_t launch_kernel(const void* kernel, void** arguments, int blocks, int threads,
                                 int cluster, int shared_bytes, cudaStream_t stream,
                                 int most_shared = kOneBlock, bool early = false) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = early ? 2 : 1;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace sidmlp::cuda

// How many blocks a launch has and the launch itself, for every kernel of csrc/cuda.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/launch.h"

namespace sidmlp::cuda {

constexpr int kBlocksPerMultiprocessor = 2;

// shape <- a block per request; where blocks need workspace, only as many as run at once, and as
// kMaxWorkspaceBytes allows. Makes the kernel's shared memory legal on the current device.
cudaError_t shape_launch(const void* kernel, const Footprint& footprint, int64_t batch,
                         LaunchShape& shape);

// Kernels have the signature (const Problem, const Layout, char* workspace).
template <class Problem, class Layout>
cudaError_t launch_kernel(const void* kernel, const Problem& problem, const Layout& layout,
                          const LaunchShape& shape, void* workspace, cudaStream_t stream) {
  void* arguments[] = {const_cast<Problem*>(&problem), const_cast<Layout*>(&layout), &workspace};
  return cudaLaunchKernel(kernel, dim3(shape.grid), dim3(kThreads), arguments,
                          static_cast<size_t>(layout.footprint.shared), stream);
}

}  // namespace sidmlp::cuda

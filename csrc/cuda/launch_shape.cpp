#include "cuda/launch_shape.h"

#include <algorithm>
#include <climits>

namespace sidmlp::cuda {

namespace {

constexpr int64_t kMaxWorkspaceBytes = int64_t{256} << 20;

}  // namespace

cudaError_t shape_launch(const void* kernel, const Footprint& footprint, int64_t batch,
                         LaunchShape& shape) {
  // Always the same number, whatever this call needs: another thread may launch the same kernel
  // with more between this call and our launch.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  int64_t blocks = std::min<int64_t>(batch, INT_MAX);
  if (footprint.workspace > 0) {
    int device = 0, multiprocessors = 0;
    error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return error;
    const int64_t resident = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
    const int64_t affordable = std::max<int64_t>(kMaxWorkspaceBytes / footprint.workspace, 1);
    blocks = std::min({blocks, resident, affordable});
  }
  shape.grid = static_cast<int>(blocks);
  shape.workspace_bytes = blocks * footprint.workspace;
  return cudaSuccess;
}

}  // namespace sidmlp::cuda

// What every operator on CUDA needs: its device, outputs from torch's caching allocator, the
// current stream, and errors of launches in words.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "torch/check.h"

namespace sidmlp::torch_ops {

// Where the call's first tensor is. The dispatcher comes here for any CUDA argument.
inline Place cuda_place(const Tensor& first, const char* name) {
  const Place place(first);
  STD_TORCH_CHECK(place.cuda, name, ": expected a CUDA tensor as the other arguments, got another");
  return place;
}

inline Tensor empty_cuda(const std::vector<int64_t>& shape, ScalarType dtype, const Place& place) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, place.device_index);
  return torch::stable::empty(shape, dtype, std::nullopt, device);
}

inline cudaStream_t current_stream(const Place& place) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(
      error == cudaSuccess, what, ": expected to launch, got CUDA error ", static_cast<int>(error),
      " (", cudaGetErrorName(error), "): ", cudaGetErrorString(error),
      error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction
          ? "; the kernels are built for compute capability 9.0 (H100, H200), rebuild "
            "with CMAKE_CUDA_ARCHITECTURES set for this GPU"
          : "");
}

// Kernels load 16 bytes of a weight row at a time.
inline void check_aligned(const std::vector<Tensor>& tensors, const char* name) {
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, name,
                    ": expected tensors aligned to 16 bytes, got a view at an odd offset; pass a "
                    "clone of it");
  }
}

}  // namespace sidmlp::torch_ops

// Device memory for the checks of this folder. Every array is an allocation of its own, as long as
// the array and no longer, so that compute-sanitizer sees an access beyond it.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace sidmlp::native {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
}

// Device memory; freed with its last owner.
class DeviceArrays {
 public:
  DeviceArrays() = default;
  DeviceArrays(const DeviceArrays&) = delete;
  DeviceArrays& operator=(const DeviceArrays&) = delete;
  ~DeviceArrays() {
    for (void* pointer : pointers_) cudaFree(pointer);
  }

  void* allocate(size_t bytes) {
    if (bytes == 0) return nullptr;
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, bytes), "cudaMalloc");
    pointers_.push_back(pointer);
    return pointer;
  }
  void* filled(size_t bytes, int byte) {
    void* pointer = allocate(bytes);
    if (bytes > 0) check(cudaMemset(pointer, byte, bytes), "cudaMemset");
    return pointer;
  }
  void* copy_of(const void* host, size_t bytes) {
    void* pointer = allocate(bytes);
    if (bytes > 0) check(cudaMemcpy(pointer, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    return pointer;
  }
  template <class T>
  T* copy_of(const std::vector<T>& host) {
    return static_cast<T*>(copy_of(host.data(), host.size() * sizeof(T)));
  }

 private:
  std::vector<void*> pointers_;
};

template <class T>
void copy_back(std::vector<T>& host, const void* device) {
  check(cudaMemcpy(host.data(), device, host.size() * sizeof(T), cudaMemcpyDeviceToHost),
        "cudaMemcpy");
}

}  // namespace sidmlp::native

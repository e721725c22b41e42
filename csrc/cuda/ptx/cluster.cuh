// Thread block clusters and distributed shared memory: one PTX instruction a function.
#pragma once

#include <cstdint>

#include "sidmlp/beam_key.h"

namespace sidmlp::cuda::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster arrives once and waits once; what was written before an arrival,
// here or in another block's shared memory, is visible after the wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The address of the same variable in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t peer_of(uint32_t own, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}
__device__ __forceinline__ uint32_t peer_address(const void* own, uint32_t rank) {
  return peer_of(shared_address(own), rank);
}

__device__ __forceinline__ float4 load_peer(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_peer(uint32_t address, uint32_t x) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_peer(uint32_t address, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void store_peer(uint32_t address, const float4& x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void store_peer(uint32_t address, const uint2& x) {
  asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y)
               : "memory");
}
__device__ __forceinline__ void store_peer(uint32_t address, BeamKey key) {
  asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(key) : "memory");
}

}  // namespace sidmlp::cuda::ptx

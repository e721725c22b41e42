// Vectors in the shared memory of other blocks of a cluster: one PTX instruction a function.
#pragma once

#include <cstdint>

namespace sidmlp::cuda::ptx {

// The same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t peer_of(uint32_t own, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  return address;
}

__device__ __forceinline__ float4 load_peer(uint32_t address) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
__device__ __forceinline__ void store_peer(uint32_t address, const uint2& x) {
  asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y)
               : "memory");
}

}  // namespace sidmlp::cuda::ptx

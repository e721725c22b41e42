// Fast functions of the multiprocessor's special unit, loads and copies: one PTX instruction a
// function.
#pragma once

#include <cstdint>

namespace sidmlp::cuda::ptx {

__device__ __forceinline__ float tanh(float x) {  // relative error below 2^-11
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float exp2(float x) {  // two units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {  // one unit in the last place
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes of a matrix too large to keep in the first-level cache; it is not written meanwhile.
__device__ __forceinline__ uint4 load_once(const void* pointer) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(pointer));
  return x;
}

// 16 bytes from global to shared memory, past the registers; `wait_copies` waits for this thread's.
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Not moved out of loops, where it would hold registers.
__device__ __forceinline__ float4 load_here(const float* pointer) {
  float4 x;
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(pointer));
  return x;
}

}  // namespace sidmlp::cuda::ptx

// Programmatic dependent launch: one PTX instruction a function.
#pragma once

namespace sidmlp::cuda::ptx {

// Blocks of the next launch of the stream may begin, if it allows that, once every block of this
// one has come here or ended.
__device__ __forceinline__ void let_next_launch_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Waits until the launch before this one has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_last_launch() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace sidmlp::cuda::ptx

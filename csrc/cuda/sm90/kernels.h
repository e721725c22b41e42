// Compiled kernels by dtype, each in a file of its own so that they are built side by side.
#pragma once

namespace sidmlp::cuda::sm90 {

// For the head width `hidden`: at most 2048, a multiple of 32.
const void* kernel_bf16(int hidden);
const void* kernel_fp16(int hidden);

}  // namespace sidmlp::cuda::sm90

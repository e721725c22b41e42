// Compiled kernels by dtype, each in a file of its own so that they are built side by side.
#pragma once

namespace sidmlp::cuda::sm90 {

// `vectors`: pieces of 8 elements of a hidden row that a lane holds, 1, 2, 4 or 8.
const void* kernel_bf16(int vectors);
const void* kernel_fp16(int vectors);

}  // namespace sidmlp::cuda::sm90

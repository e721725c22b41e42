// Which encoders the CUDA backend takes, for Python to ask without a GPU.
#pragma once

#include <string>

namespace sidmlp {

// Why there is no CUDA kernel for a T5 encoder of these sizes (csrc/cuda/sm90/encoder/sizes.h), or
// "". `half`: bf16 or fp16 weights.
std::string encode_t5_why_not(bool half, int dim, int layers, int heads, int head_dim, int ffn_dim);

// The same of SID-MLP++'s encoder (csrc/cuda/sm90/mlp_encoder/shape.h).
std::string encode_mlp_why_not(bool half, int dim, int layers, int roles, int hidden_dim);

}  // namespace sidmlp

// Token ids -> states of SID-MLP++'s encoder, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/mlp_encoder/shape.h"

namespace sidmlp::cuda::sm90 {

struct EncodeMlpProblem {
  MlpView model;
  TokensView tokens;
  void* states;  // [batch, tokens, D] in the model's dtype, 16-byte aligned; zeros where masked
};

// Why the kernel does not take this problem; nullptr when it does. The batch does not decide.
const char* why_not(const EncodeMlpProblem& problem);

// `form`: blocks that share requests, 1, 2, 4 or 8 (at most one for each role), 0 by batch.
MlpShape mlp_shape(const EncodeMlpProblem& problem, int form);

// One launch, nothing for an empty batch. `workspace`: 256-byte aligned, workspace_bytes of
// mlp_shape. Takes what why_not accepts.
cudaError_t launch(const EncodeMlpProblem& problem, int form, void* workspace, cudaStream_t stream);

// Kernels by dtype, each in a file of its own.
const void* encode_mlp_bf16();
const void* encode_mlp_fp16();
const void* encode_mlp_fp32();

}  // namespace sidmlp::cuda::sm90

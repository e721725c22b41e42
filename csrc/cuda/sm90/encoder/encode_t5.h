// Token ids -> states of a T5 encoder, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/encoder/sizes.h"
#include "sidmlp/encoder_view.h"

namespace sidmlp::cuda::sm90 {

struct EncodeT5Problem {
  T5View model;
  TokensView tokens;
  void* states;  // [batch, tokens, D] in the model's dtype, 16-byte aligned; zeros where masked
};

// Why the kernels do not take this problem; nullptr when they do. The batch does not decide.
const char* why_not(const EncodeT5Problem& problem);
// The same of one form: only kLong does not take whatever the others take.
const char* why_not(const EncodeT5Problem& problem, EncodeForm form);

// Bytes of global memory that the launch needs, 256-byte aligned; 0 for short requests.
int64_t workspace_bytes(const EncodeT5Problem& problem, EncodeForm form);

// One launch, nothing for an empty batch. Takes what why_not accepts.
cudaError_t launch(const EncodeT5Problem& problem, EncodeForm form, void* workspace,
                   cudaStream_t stream);

}  // namespace sidmlp::cuda::sm90

// The wgmma forms for few requests, one a block or a cluster at a time: which models they take.
#pragma once

#include "cuda/sm90/encoder/wide.h"

namespace sidmlp::cuda::sm90 {

constexpr int kSplitRows = 128;     // of a request: two warpgroups of 64
constexpr int kSplitThreads = 384;  // and a warpgroup for the copies

// Whether the model, never the request, is one for these kernels.
constexpr bool takes_split(const T5View& m) { return takes_wide(m) && m.bias_tokens <= kSplitRows; }

// `blocks` a request: 1, 2, 4 or 8.
int split_shared_bytes(const EncodeT5Problem& problem, int blocks);

// Kernels by dtype, each in a file of its own.
const void* split_bf16(Activation activation, int blocks);
const void* split_fp16(Activation activation, int blocks);

}  // namespace sidmlp::cuda::sm90

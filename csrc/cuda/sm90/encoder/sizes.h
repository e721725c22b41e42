// Which T5 encoders the sm90 kernels take, and how a batch chooses its form. Plain C++.
#pragma once

#include <climits>
#include <cstdint>

#include "sidmlp/encoder_view.h"

namespace sidmlp::cuda::sm90 {

// A form fixes the order of every sum: within one, the bits of a request's states depend on its
// valid tokens and their positions only. Between two forms they differ by roundings.
enum class EncodeForm : int32_t {
  kAuto = 0,        // by batch, from kEncodeForms and long.h
  kThroughput = 1,  // a block takes whole requests through all layers
  kCluster2 = 2,    // as many blocks share a request's heads and feed-forward columns
  kCluster4 = 4,
  kCluster8 = 8,
  kCluster1 = 16,  // a block takes one request at a time; models that split.h does not take: as 1
  kLong = 32  // all blocks go through all requests together, layer by layer; models of long.h alone
};

struct EncodeFormRow {
  int64_t most_requests;  // a batch of at most so many takes the form
  EncodeForm form;
  const char* reason;
};

// Measured by hand on an H200 with bf16, 4 layers, D 128, 6 heads of 64, F 1024, 82 tokens,
// 2026-11-22; microseconds of a graph replay.
constexpr EncodeFormRow kEncodeForms[] = {
    {15, EncodeForm::kCluster8,
     "the chip is idle: eight blocks a request, 15 clusters fit at once; batch 15: 118, "
     "four blocks 161"},
    {30, EncodeForm::kCluster4,
     "four blocks a request, 30 clusters fit at once; 161, two blocks 248"},
    {66, EncodeForm::kCluster2, "two blocks a request, 66 clusters fit at once; batch 66: 248"},
    {INT64_MAX, EncodeForm::kThroughput, "a block a request fills the chip; batch 128: 453"},
};

// For models that wgmma takes (wide.h), whose throughput form is another kernel.
constexpr EncodeFormRow kWideEncodeForms[] = {
    {15, EncodeForm::kCluster8, "as for other models"},
    {30, EncodeForm::kCluster4, "as for other models"},
    {INT64_MAX, EncodeForm::kThroughput,
     "batch 32: 244, two blocks a request 248; batch 128: 240, 497"},
};

// For models of short requests, whose forms for few of them are wgmma too (split.h).
constexpr EncodeFormRow kSplitEncodeForms[] = {
    {15, EncodeForm::kCluster8,
     "the chip is idle: eight blocks a request, 15 clusters fit at once; batch 15: 52, four 68"},
    {30, EncodeForm::kCluster4,
     "four blocks a request, 30 clusters fit at once; batch 30: 72, two blocks 95"},
    {66, EncodeForm::kCluster2,
     "two blocks a request, 66 clusters fit at once; batch 66: 95, one block 124"},
    {132, EncodeForm::kCluster1, "a block a request; batch 128: 125, throughput 194"},
    {INT64_MAX, EncodeForm::kThroughput, "several requests a block; batch 256: 215, 246"},
};

// Which kernels of the family a model takes.
enum class EncodeKernels { kGeneral, kWide, kSplit };

constexpr EncodeForm form_of(EncodeForm asked, int64_t batch, EncodeKernels kernels) {
  if (asked != EncodeForm::kAuto) return asked;
  const auto choose = [&](const auto& rows) {
    for (const EncodeFormRow& row : rows)
      if (batch <= row.most_requests) return row.form;
    return EncodeForm::kThroughput;
  };
  return kernels == EncodeKernels::kSplit  ? choose(kSplitEncodeForms)
         : kernels == EncodeKernels::kWide ? choose(kWideEncodeForms)
                                           : choose(kEncodeForms);
}

struct EncodeSizes {
  bool half;  // bf16 or fp16 weights
  int dim;
  int layers;
  int heads;
  int head_dim;
  int ffn_dim;
};

// Why the kernels do not take these sizes; nullptr when they do.
constexpr const char* why_not(const EncodeSizes& sizes) {
  if (!sizes.half) return "float32 weights: tensor cores would round them";
  if (sizes.layers < 1 || sizes.layers > kMaxEncoderLayers) return "num_layers: expected 1 .. 8";
  if (sizes.dim % 16 != 0 || sizes.dim < 16 || sizes.dim > 512)
    return "dim: expected a multiple of 16 up to 512";
  if (sizes.head_dim % 16 != 0 || sizes.head_dim < 16 || sizes.head_dim > 128)
    return "head_dim: expected a multiple of 16 up to 128";
  if (sizes.heads < 1 || sizes.heads * sizes.head_dim > 1024)
    return "num_heads: expected heads * head_dim up to 1024";
  if (sizes.ffn_dim % 16 != 0 || sizes.ffn_dim < 16) return "ffn_dim: expected a multiple of 16";
  return nullptr;
}

}  // namespace sidmlp::cuda::sm90

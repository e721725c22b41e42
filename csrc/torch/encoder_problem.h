// Encoder operators' arguments -> the structs that kernels take, every size and dtype checked. The
// order of the lists is fixed by sidmlp_kernels/encoder_packing.py.
#pragma once

#include <vector>

#include "cpu/encoders.h"
#include "sidmlp/encoder_view.h"
#include "sidmlp/mlp_encoder_view.h"
#include "torch/check.h"

namespace sidmlp::torch_ops {

// `sizes`: [layers, D, heads, head_dim, F, V, activation, M]
struct T5Sizes {
  int num_layers, dim, num_heads, head_dim, ffn_dim, vocab_size, bias_tokens;
  Activation activation;

  explicit T5Sizes(const std::vector<int64_t>& sizes);
};

// `sizes`: [layers, D, roles, H, V, max_length]
struct MlpSizes {
  int num_layers, dim, num_roles, hidden_dim, vocab_size, max_length;

  explicit MlpSizes(const std::vector<int64_t>& sizes);
};

// `form`: blocks that share a request, 1, 2, 4 or 8; 0 by batch. The CPU has one form.
void check_form(int64_t form);
TokensView tokens_view(const Tensor& ids, const Tensor& mask, const Place&);
// The layout of sidmlp/encoder_view.h: [embedding, position_bias, final_gain, tiles], then for each
// layer [attention_gain, qkv, attention_out, ffn_gain, ffn_in, ffn_out].
T5View t5_view(const T5Sizes&, const std::vector<Tensor>& encoder, double layer_norm_eps,
               const Place&);
// The layout of sidmlp/mlp_encoder_view.h: [embedding, positions, norm], then for each layer
// [token, mean, vectors, out, bias].
MlpView mlp_view(const MlpSizes&, const std::vector<Tensor>& encoder, double layer_norm_eps,
                 const Place&);
// At most max_length tokens, the encoder's positions.
void check_positions(const MlpSizes&, const TokensView&);
// 8 sizes: of encode_t5, 6: of encode_mlp; nothing else.
void check_kind(const std::vector<int64_t>& encoder_sizes);
// The layouts of cpu/encoders.h.
cpu::T5Panels t5_panels(const T5Sizes&, const std::vector<Tensor>& encoder, double layer_norm_eps,
                        const Place&);
cpu::MlpPanels mlp_panels(const MlpSizes&, const std::vector<Tensor>& encoder,
                          double layer_norm_eps, const Place&);

}  // namespace sidmlp::torch_ops

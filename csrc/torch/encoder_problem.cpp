#include "torch/encoder_problem.h"

#include <cmath>
#include <string>

namespace sidmlp::torch_ops {

namespace {

constexpr int64_t kMaxWidth = 1 << 20;

int checked_size(int64_t value, int64_t low, int64_t high, const char* name) {
  STD_TORCH_CHECK(value >= low && value <= high, name, ": expected ", low, "..", high, ", got ",
                  value);
  return static_cast<int>(value);
}

void check_count(const std::vector<Tensor>& tensors, size_t expected) {
  STD_TORCH_CHECK(tensors.size() == expected, "encoder: expected ", expected, " tensors, got ",
                  tensors.size());
}

float checked_eps(double eps) {
  STD_TORCH_CHECK(std::isfinite(static_cast<float>(eps)) && static_cast<float>(eps) > 0,
                  "layer_norm_eps: expected a finite number above 0 (in float32), got ", eps);
  return static_cast<float>(eps);
}

// Either layout of SID-MLP++'s encoder: matrices of `inner_dim` and `inner_hidden` inner elements.
template <class View>
void fill_mlp(View& view, const MlpSizes& s, const std::vector<Tensor>& tensors,
              double layer_norm_eps, int64_t inner_dim, int64_t inner_hidden, const Place& place) {
  constexpr int kPerLayer = 5;
  check_count(tensors, 3 + static_cast<size_t>(kPerLayer * s.num_layers));
  const int64_t dim_pad = padded(s.dim), hidden_pad = padded(s.hidden_dim);
  view.dtype = weight_dtype(tensors[0], "encoder.embedding");
  const ScalarType weight = scalar_type_of(view.dtype);
  view.num_layers = s.num_layers, view.num_roles = s.num_roles, view.dim = s.dim;
  view.hidden_dim = s.hidden_dim, view.vocab_size = s.vocab_size, view.max_length = s.max_length;
  view.eps = checked_eps(layer_norm_eps);
  view.embedding =
      check_tensor(tensors[0], "encoder.embedding", weight, {s.vocab_size, dim_pad}, place);
  view.positions =
      check_tensor(tensors[1], "encoder.positions", weight, {s.max_length, dim_pad}, place);
  view.norm = check_as<float>(tensors[2], "encoder.norm", ScalarType::Float, {2, dim_pad}, place);
  for (int l = 0; l < s.num_layers; ++l) {
    const Tensor* t = &tensors[3 + kPerLayer * l];
    const std::string at = "encoder." + std::to_string(l) + ".";
    auto& layer = view.layers[l];
    layer.token =
        check_tensor(t[0], at + "token", weight, {s.num_roles, inner_dim * hidden_pad}, place);
    layer.mean =
        check_tensor(t[1], at + "mean", weight, {s.num_roles, inner_dim * hidden_pad}, place);
    layer.vectors = check_as<float>(t[2], at + "vectors", ScalarType::Float,
                                    {s.num_roles, 3, hidden_pad}, place);
    layer.out =
        check_tensor(t[3], at + "out", weight, {s.num_roles, inner_hidden * dim_pad}, place);
    layer.bias =
        check_as<float>(t[4], at + "bias", ScalarType::Float, {s.num_roles, dim_pad}, place);
  }
}

}  // namespace

T5Sizes::T5Sizes(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 8, "sizes: expected 8 numbers, got ", sizes.size());
  num_layers = checked_size(sizes[0], 1, kMaxEncoderLayers, "number of layers");
  dim = checked_size(sizes[1], 1, kMaxWidth, "dim");
  num_heads = checked_size(sizes[2], 1, kMaxWidth, "num_heads");
  head_dim = checked_size(sizes[3], 1, kMaxWidth, "head_dim");
  ffn_dim = checked_size(sizes[4], 1, kMaxWidth, "ffn_dim");
  vocab_size = checked_size(sizes[5], 1, INT32_MAX, "vocab_size");
  activation = static_cast<Activation>(checked_size(sizes[6], 0, 3, "activation"));
  bias_tokens = checked_size(sizes[7], 1, kMaxWidth, "tokens of the position bias");
}

MlpSizes::MlpSizes(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 6, "sizes: expected 6 numbers, got ", sizes.size());
  num_layers = checked_size(sizes[0], 1, kMaxEncoderLayers, "number of layers");
  dim = checked_size(sizes[1], 1, kMaxWidth, "dim");
  num_roles = checked_size(sizes[2], 1, cpu::kMaxRoles, "number of roles");
  hidden_dim = checked_size(sizes[3], 1, kMaxWidth, "hidden_dim");
  vocab_size = checked_size(sizes[4], 1, INT32_MAX, "vocab_size");
  max_length = checked_size(sizes[5], 1, kMaxWidth, "max_length");
}

void check_form(int64_t form) {
  STD_TORCH_CHECK(
      form == 0 || form == 1 || form == 2 || form == 4 || form == 8 || form == 16 || form == 32,
      "form: expected 0 (by batch), 1 (throughput), 2, 4 or 8 blocks a request, 16 (one block a "
      "request) or 32 (long), got ",
      form);
}

TokensView tokens_view(const Tensor& ids, const Tensor& mask, const Place& place) {
  STD_TORCH_CHECK(ids.dim() == 2, "ids: expected [batch, tokens], got ", shape_text(shape_of(ids)));
  const int64_t batch = ids.size(0), tokens = ids.size(1);
  STD_TORCH_CHECK(tokens <= kMaxWidth, "ids: expected at most ", kMaxWidth, " tokens, got ",
                  tokens);
  TokensView view{};
  view.ids = check_as<int64_t>(ids, "ids", ScalarType::Long, {batch, tokens}, place);
  view.mask = check_as<uint8_t>(mask, "mask", ScalarType::Bool, {batch, tokens}, place);
  view.batch = batch;
  view.tokens = static_cast<int>(tokens);
  return view;
}

void check_positions(const MlpSizes& s, const TokensView& tokens) {
  STD_TORCH_CHECK(tokens.tokens <= s.max_length, "ids: expected at most ", s.max_length,
                  " tokens, the positions of the encoder, got ", tokens.tokens);
}

void check_kind(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() == 6 || sizes.size() == 8,
                  "encoder_sizes: expected 8 numbers (of encode_t5) or 6 (of encode_mlp), got ",
                  sizes.size());
}

T5View t5_view(const T5Sizes& s, const std::vector<Tensor>& tensors, double layer_norm_eps,
               const Place& place) {
  constexpr int kPerLayer = 6;
  check_count(tensors, 4 + static_cast<size_t>(kPerLayer * s.num_layers));
  const int64_t dim = s.dim, width = static_cast<int64_t>(s.num_heads) * s.head_dim;
  const int64_t ffn = s.ffn_dim, ffn_in = is_gated(s.activation) ? 2 * ffn : ffn;
  T5View view{};
  view.dtype = weight_dtype(tensors[0], "encoder.embedding");
  const ScalarType weight = scalar_type_of(view.dtype);
  view.vocab_size = s.vocab_size, view.dim = s.dim, view.num_layers = s.num_layers;
  view.num_heads = s.num_heads, view.head_dim = s.head_dim, view.ffn_dim = s.ffn_dim;
  view.activation = s.activation, view.bias_tokens = s.bias_tokens;
  view.layer_norm_eps = checked_eps(layer_norm_eps);
  view.embedding =
      check_tensor(tensors[0], "encoder.embedding", weight, {s.vocab_size, dim}, place);
  view.position_bias =
      check_as<float>(tensors[1], "encoder.position_bias", ScalarType::Float,
                      {s.num_heads, 2 * static_cast<int64_t>(s.bias_tokens) - 1}, place);
  view.final_gain =
      check_as<float>(tensors[2], "encoder.final_gain", ScalarType::Float, {dim}, place);
  const int64_t per_layer = 4 * width * dim + (ffn_in + ffn) * dim;
  const bool tiled = tensors[3].numel() > 0;
  const void* tiles = check_tensor(tensors[3], "encoder.tiles", weight,
                                   {tiled ? s.num_layers * per_layer : 0}, place);
  view.tiles = tiled ? tiles : nullptr;
  for (int l = 0; l < s.num_layers; ++l) {
    const Tensor* t = &tensors[4 + kPerLayer * l];
    const std::string at = "encoder." + std::to_string(l) + ".";
    auto gain = [&](int i, const char* name) {
      return check_as<float>(t[i], at + name, ScalarType::Float, {dim}, place);
    };
    auto matrix = [&](int i, const char* name, int64_t rows, int64_t columns) {
      return check_tensor(t[i], at + name, weight, {rows, columns}, place);
    };
    T5LayerView& layer = view.layers[l];
    layer.attention_gain = gain(0, "attention_gain");
    layer.qkv = matrix(1, "qkv", 3 * width, dim);
    layer.attention_out = matrix(2, "attention_out", dim, width);
    layer.ffn_gain = gain(3, "ffn_gain");
    layer.ffn_in = matrix(4, "ffn_in", ffn_in, dim);
    layer.ffn_out = matrix(5, "ffn_out", dim, ffn);
  }
  return view;
}

cpu::T5Panels t5_panels(const T5Sizes& s, const std::vector<Tensor>& tensors, double layer_norm_eps,
                        const Place& place) {
  constexpr int kPerLayer = 7;
  check_count(tensors, 3 + static_cast<size_t>(kPerLayer * s.num_layers));
  const int64_t dim_pad = padded(s.dim), ffn_pad = padded(s.ffn_dim);
  const int64_t width = s.num_heads * padded(s.head_dim);
  cpu::T5Panels view{};
  view.dtype = weight_dtype(tensors[0], "encoder.embedding");
  const ScalarType weight = scalar_type_of(view.dtype);
  view.num_layers = s.num_layers, view.dim = s.dim, view.num_heads = s.num_heads;
  view.head_dim = s.head_dim, view.ffn_dim = s.ffn_dim, view.vocab_size = s.vocab_size;
  view.bias_tokens = s.bias_tokens, view.activation = s.activation;
  view.eps = checked_eps(layer_norm_eps);
  view.embedding =
      check_tensor(tensors[0], "encoder.embedding", weight, {s.vocab_size, dim_pad}, place);
  view.bias = check_as<float>(tensors[1], "encoder.position_bias", ScalarType::Float,
                              {s.num_heads, 2 * static_cast<int64_t>(s.bias_tokens) - 1}, place);
  view.norms = check_as<float>(tensors[2], "encoder.norms", ScalarType::Float,
                               {2 * s.num_layers + 1, dim_pad}, place);
  for (int l = 0; l < s.num_layers; ++l) {
    const Tensor* t = &tensors[3 + kPerLayer * l];
    const std::string at = "encoder." + std::to_string(l) + ".";
    auto panels = [&](int i, const char* name, int64_t inner, int64_t columns) {
      return check_tensor(t[i], at + name, weight, {inner * columns}, place);
    };
    cpu::T5LayerPanels& layer = view.layers[l];
    layer.query = panels(0, "query", s.dim, width);
    layer.key = panels(1, "key", s.dim, width);
    layer.value = panels(2, "value", s.dim, width);
    layer.output = panels(3, "output", width, dim_pad);
    layer.ffn_in = panels(4, "ffn_in", s.dim, ffn_pad);
    const void* up = panels(5, "ffn_up", is_gated(s.activation) ? s.dim : 0, ffn_pad);
    layer.ffn_up = is_gated(s.activation) ? up : nullptr;
    layer.ffn_out = panels(6, "ffn_out", s.ffn_dim, dim_pad);
  }
  return view;
}

MlpView mlp_view(const MlpSizes& s, const std::vector<Tensor>& tensors, double layer_norm_eps,
                 const Place& place) {
  MlpView view{};
  fill_mlp(view, s, tensors, layer_norm_eps, padded(s.dim), padded(s.hidden_dim), place);
  return view;
}

cpu::MlpPanels mlp_panels(const MlpSizes& s, const std::vector<Tensor>& tensors,
                          double layer_norm_eps, const Place& place) {
  cpu::MlpPanels view{};
  fill_mlp(view, s, tensors, layer_norm_eps, s.dim, s.hidden_dim, place);
  return view;
}

}  // namespace sidmlp::torch_ops

// What the states of a batch must be: an fp64 reference, and the same mathematics with the
// roundings of half precision as a yardstick.
//
// With e(x) the root of the sum of squared differences from the reference, over that of the
// reference's squares:
//
//   e(states) <= 2 e(rounded reference) + floor
//
// floor: a state's own rounding. Masked states are zeros, a request with an unknown id is NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "native/encode_problem.h"

namespace sidmlp::native {

inline double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGatedGelu:
      return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    default:
      return std::max(x, 0.0);
  }
}

// States of the valid tokens of one request, [n, D]; half: operands of products are rounded.
template <class T>
std::vector<double> reference(const Model& model, const std::vector<int64_t>& ids,
                              const std::vector<int>& at, bool half) {
  const Case& sizes = model.sizes;
  const int n = static_cast<int>(at.size()), dim = sizes.dim, hd = sizes.head_dim;
  const int width = sizes.heads * hd, ffn = sizes.ffn;
  auto round = [&](T x) {
    return half ? static_cast<T>(widen(sizes.dtype, narrow(sizes.dtype, static_cast<float>(x))))
                : x;
  };
  std::vector<T> x(static_cast<size_t>(n) * dim);
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < dim; ++d) x[i * dim + d] = model.embedding.values[ids[at[i]] * dim + d];
  auto norm = [&](const std::vector<float>& gain) {
    std::vector<T> y(x.size());
    for (int i = 0; i < n; ++i) {
      T sum = 0;
      for (int d = 0; d < dim; ++d) sum += x[i * dim + d] * x[i * dim + d];
      const T scale = 1 / std::sqrt(sum / dim + static_cast<T>(1e-6f));
      for (int d = 0; d < dim; ++d) y[i * dim + d] = round(x[i * dim + d] * scale * gain[d]);
    }
    return y;
  };
  auto linear = [&](const std::vector<T>& a, int inner, const Matrix& w, int outer) {
    std::vector<T> y(static_cast<size_t>(n) * outer);
    for (int i = 0; i < n; ++i)
      for (int o = 0; o < outer; ++o) {
        const T* from = a.data() + static_cast<int64_t>(i) * inner;
        const float* row = w.values.data() + static_cast<int64_t>(o) * inner;
        T sum = 0;
        for (int k = 0; k < inner; ++k) sum += from[k] * static_cast<T>(row[k]);
        y[static_cast<int64_t>(i) * outer + o] = sum;
      }
    return y;
  };
  for (const Layer& layer : model.layers) {
    std::vector<T> qkv = linear(norm(layer.attention_gain), dim, layer.qkv, 3 * width);
    for (T& v : qkv) v = round(v);
    std::vector<T> mixed(static_cast<size_t>(n) * width), p(n);
    for (int h = 0; h < sizes.heads; ++h)
      for (int i = 0; i < n; ++i) {
        T most = -1e30, total = 0;
        for (int j = 0; j < n; ++j) {
          T score =
              model.bias[h * (2 * model.bias_tokens - 1) + at[j] - at[i] + model.bias_tokens - 1];
          for (int d = 0; d < hd; ++d)
            score += qkv[i * 3 * width + h * hd + d] * qkv[j * 3 * width + width + h * hd + d];
          p[j] = score;
          most = std::max(most, score);
        }
        for (T& v : p) total += v = std::exp(v - most);
        for (int d = 0; d < hd; ++d) {
          T sum = 0;
          for (int j = 0; j < n; ++j)
            sum += round(p[j]) * qkv[j * 3 * width + 2 * width + h * hd + d];
          mixed[i * width + h * hd + d] = round(sum / total);
        }
      }
    const std::vector<T> out = linear(mixed, width, layer.out, dim);
    for (size_t i = 0; i < x.size(); ++i) x[i] += out[i];
    const bool gated = is_gated(sizes.activation);
    const std::vector<T> in =
        linear(norm(layer.ffn_gain), dim, layer.ffn_in, (gated ? 2 : 1) * ffn);
    std::vector<T> hidden(static_cast<size_t>(n) * ffn);
    for (int i = 0; i < n; ++i)
      for (int f = 0; f < ffn; ++f) {
        const T* row = in.data() + static_cast<int64_t>(i) * (gated ? 2 : 1) * ffn;
        T value = static_cast<T>(activated(sizes.activation, row[f]));
        if (gated) value *= row[ffn + f];
        hidden[static_cast<int64_t>(i) * ffn + f] = round(value);
      }
    const std::vector<T> y = linear(hidden, ffn, layer.ffn_out, dim);
    for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
  }
  const std::vector<T> y = norm(model.final_gain);
  return {y.begin(), y.end()};
}

struct Errors {
  double states = 0, rounded = 0;  // relative to the reference
};

class EncodeJudge {
 public:
  // The first requests of `in` are compared with the reference, which takes long.
  EncodeJudge(const Model& model, const Input& in)
      : sizes_(model.sizes), in_(in), wanted_(in.batch()), rounded_(in.batch()) {
    judged_ = sizes_.tokens > 500 ? 1 : std::min(in.batch(), 4);
    for (int b = sizes_.bad_id ? 1 : 0; b < judged_; ++b) {
      const std::vector<int64_t> ids(in.ids.begin() + b * in.tokens,
                                     in.ids.begin() + (b + 1) * in.tokens);
      wanted_[b] = reference<double>(model, ids, in.valid(b), false);
      rounded_[b] = reference<float>(model, ids, in.valid(b), true);
    }
  }

  // Faults of the states [batch, tokens, dim] of the batch; "" for none.
  std::string faults(const std::vector<uint16_t>& got, Errors* errors) const {
    std::string wrong;
    double error = 0, yardstick = 0, size = 0;
    for (int b = 0; b < in_.batch(); ++b) {
      const std::vector<int> at = in_.valid(b);
      for (int t = 0, i = 0; t < in_.tokens; ++t) {
        const bool valid = i < static_cast<int>(at.size()) && at[i] == t;
        for (int d = 0; d < sizes_.dim; ++d) {
          const uint16_t bits = got[(static_cast<int64_t>(b) * in_.tokens + t) * sizes_.dim + d];
          const double x = widen(sizes_.dtype, bits);
          if (!valid) {
            if (bits != 0 && wrong.empty()) wrong = "a masked state is not 0";
          } else if (sizes_.bad_id && b == 0) {
            if (!std::isnan(x) && wrong.empty()) wrong = "an unknown id does not make NaN";
          } else if (!std::isfinite(x)) {
            wrong = "not finite: request " + std::to_string(b) + " token " + std::to_string(t);
          } else if (b < judged_) {
            const double y = wanted_[b][i * sizes_.dim + d], z = rounded_[b][i * sizes_.dim + d];
            error += (x - y) * (x - y), yardstick += (z - y) * (z - y), size += y * y;
          }
        }
        if (valid) ++i;
      }
    }
    *errors = {std::sqrt(error / size), std::sqrt(yardstick / size)};
    const double floor = sizes_.dtype == DType::kBFloat16 ? 2e-3 : 2.5e-4;
    if (!(errors->states <= 2 * errors->rounded + floor)) wrong += " error";
    return wrong;
  }

 private:
  const Case& sizes_;
  const Input& in_;
  int judged_;
  std::vector<std::vector<double>> wanted_, rounded_;
};

}  // namespace sidmlp::native

// encode_check: the CUDA T5 encoder against an fp64 reference on seeded problems, without torch and
// Python, for compute-sanitizer and for debuggers.
//
//     encode_check            a fixed list of cases, every form of each
//       --small               without cases that take long under a sanitizer
//       --time                microseconds of graph replays at the published sizes instead
//       --form N              only the form of N blocks a request
//       --batch N             only this batch is timed
//
// For each case and form: the relative error against the reference, at most twice that of the same
// mathematics with the roundings of half precision; the same bits for a request alone, elsewhere in
// the batch, with more padding, and from a workspace of NaNs; masked states are zeros, a request
// with an unknown id is NaN. Exit status 0: all hold, 1: some do not, 77: no CUDA device, 2: usage.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/sm90/encoder/encode_t5.h"

namespace sidmlp::native {

namespace {

using cuda::sm90::EncodeForm;
using cuda::sm90::EncodeT5Problem;

constexpr int kNoDevice = 77;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Case {
  const char* name;
  DType dtype = DType::kBFloat16;
  int dim = 128, layers = 4, heads = 6, head_dim = 64, ffn = 1024;
  Activation activation = Activation::kRelu;
  int tokens = 82, batch = 3;
  enum Mask { kFull, kPrefix, kAny } mask = kPrefix;
  bool bad_id = false;
};

uint16_t narrow(DType dtype, float x) {
  uint16_t bits;
  if (dtype == DType::kBFloat16) {
    const __nv_bfloat16 y = __float2bfloat16_rn(x);
    memcpy(&bits, &y, 2);
  } else {
    const __half y = __float2half_rn(x);
    memcpy(&bits, &y, 2);
  }
  return bits;
}
float widen(DType dtype, uint16_t bits) {
  if (dtype == DType::kBFloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
  __half y;
  memcpy(&y, &bits, 2);
  return __half2float(y);
}

// An allocation as long as its array and no longer, so that compute-sanitizer sees an access
// beyond.
class Device {
 public:
  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() {
    for (void* pointer : pointers_) cudaFree(pointer);
  }
  void* filled(size_t bytes, int byte) {
    if (bytes == 0) return nullptr;
    void* pointer = nullptr;
    check(cudaMalloc(&pointer, bytes), "cudaMalloc");
    pointers_.push_back(pointer);
    check(cudaMemset(pointer, byte, bytes), "cudaMemset");
    return pointer;
  }
  template <class T>
  T* copy(const std::vector<T>& host) {
    void* pointer = filled(host.size() * sizeof(T), 0);
    check(cudaMemcpy(pointer, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
          "cudaMemcpy");
    return static_cast<T*>(pointer);
  }

 private:
  std::vector<void*> pointers_;
};

struct Matrix {
  std::vector<uint16_t> bits;
  std::vector<float> values;  // as rounded
};

struct Layer {
  Matrix qkv, out, ffn_in, ffn_out;
  std::vector<float> attention_gain, ffn_gain;
};

struct Model {
  Case sizes;
  int vocab = 500, bias_tokens;
  Matrix embedding;
  std::vector<float> bias, final_gain;
  std::vector<Layer> layers;

  explicit Model(const Case& c, uint64_t seed) : sizes(c), bias_tokens(c.tokens + 20) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    auto matrix = [&](int64_t rows, int64_t columns, float scale) {
      Matrix m;
      m.bits.resize(rows * columns);
      m.values.resize(rows * columns);
      for (int64_t i = 0; i < rows * columns; ++i) {
        m.bits[i] = narrow(c.dtype, normal(random) * scale);
        m.values[i] = widen(c.dtype, m.bits[i]);
      }
      return m;
    };
    auto gains = [&] {
      std::vector<float> g(c.dim);
      for (float& x : g) x = 1.0f + 0.2f * normal(random);
      return g;
    };
    const int width = c.heads * c.head_dim;
    embedding = matrix(vocab, c.dim, 1.0f);
    bias.resize(static_cast<size_t>(c.heads) * (2 * bias_tokens - 1));
    for (float& x : bias) x = normal(random);
    final_gain = gains();
    for (int l = 0; l < c.layers; ++l) {
      Layer layer;
      const float in = 1.0f / std::sqrt(static_cast<float>(c.dim));
      layer.qkv = matrix(3 * width, c.dim, in);
      // T5's scores are not divided: its queries are small instead.
      for (int64_t i = 0; i < static_cast<int64_t>(width) * c.dim; ++i) {
        float& x = layer.qkv.values[i];
        layer.qkv.bits[i] = narrow(c.dtype, x / std::sqrt(static_cast<float>(c.head_dim)));
        x = widen(c.dtype, layer.qkv.bits[i]);
      }
      layer.out = matrix(c.dim, width, 1.0f / std::sqrt(static_cast<float>(width)));
      layer.ffn_in = matrix((is_gated(c.activation) ? 2 : 1) * c.ffn, c.dim, in);
      layer.ffn_out = matrix(c.dim, c.ffn, 1.0f / std::sqrt(static_cast<float>(c.ffn)));
      layer.attention_gain = gains();
      layer.ffn_gain = gains();
      layers.push_back(std::move(layer));
    }
  }

  // wgmma's blocks, as encoder_view.h states them; empty where they do not apply.
  std::vector<uint16_t> tiles() const {
    std::vector<uint16_t> all;
    auto add = [&](const Matrix& m, int64_t columns) {
      const int64_t rows = static_cast<int64_t>(m.bits.size()) / columns;
      const size_t at = all.size();
      if (rows % 64 != 0 || columns % 64 != 0) return false;
      all.resize(at + m.bits.size());
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t block = r / 64 * (columns / 64) + k / 64, piece = k % 64 / 8 ^ r % 8;
          all[at + block * 4096 + r % 64 * 64 + piece * 8 + k % 8] = m.bits[r * columns + k];
        }
      return true;
    };
    for (const Layer& l : layers)
      if (!add(l.qkv, sizes.dim) || !add(l.out, sizes.heads * sizes.head_dim) ||
          !add(l.ffn_in, sizes.dim) || !add(l.ffn_out, sizes.ffn))
        return {};
    return all;
  }

  T5View view(Device& device) const {
    T5View v{};
    v.dtype = sizes.dtype;
    v.vocab_size = vocab;
    v.dim = sizes.dim, v.num_layers = sizes.layers, v.num_heads = sizes.heads;
    v.head_dim = sizes.head_dim, v.ffn_dim = sizes.ffn, v.activation = sizes.activation;
    v.layer_norm_eps = 1e-6f, v.bias_tokens = bias_tokens;
    v.embedding = device.copy(embedding.bits);
    v.position_bias = device.copy(bias);
    v.final_gain = device.copy(final_gain);
    for (int l = 0; l < sizes.layers; ++l) {
      T5LayerView& to = v.layers[l];
      to.attention_gain = device.copy(layers[l].attention_gain);
      to.ffn_gain = device.copy(layers[l].ffn_gain);
      to.qkv = device.copy(layers[l].qkv.bits);
      to.attention_out = device.copy(layers[l].out.bits);
      to.ffn_in = device.copy(layers[l].ffn_in.bits);
      to.ffn_out = device.copy(layers[l].ffn_out.bits);
    }
    const std::vector<uint16_t> blocks = tiles();
    v.tiles = blocks.empty() ? nullptr : device.copy(blocks);
    return v;
  }

  double act(double x) const {
    switch (sizes.activation) {
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
  std::vector<double> reference(const std::vector<int64_t>& ids, const std::vector<int>& at,
                                bool half) const {
    const int n = static_cast<int>(at.size()), dim = sizes.dim, hd = sizes.head_dim;
    const int width = sizes.heads * hd, ffn = sizes.ffn;
    auto round = [&](T x) {
      return half ? static_cast<T>(widen(sizes.dtype, narrow(sizes.dtype, static_cast<float>(x))))
                  : x;
    };
    std::vector<T> x(static_cast<size_t>(n) * dim);
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < dim; ++d) x[i * dim + d] = embedding.values[ids[at[i]] * dim + d];
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
    for (const Layer& layer : layers) {
      std::vector<T> qkv = linear(norm(layer.attention_gain), dim, layer.qkv, 3 * width);
      for (T& v : qkv) v = round(v);
      std::vector<T> mixed(static_cast<size_t>(n) * width), p(n);
      for (int h = 0; h < sizes.heads; ++h)
        for (int i = 0; i < n; ++i) {
          T most = -1e30, total = 0;
          for (int j = 0; j < n; ++j) {
            T score = bias[h * (2 * bias_tokens - 1) + at[j] - at[i] + bias_tokens - 1];
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
          T value = static_cast<T>(act(row[f]));
          if (gated) value *= row[ffn + f];
          hidden[static_cast<int64_t>(i) * ffn + f] = round(value);
        }
      const std::vector<T> y = linear(hidden, ffn, layer.ffn_out, dim);
      for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
    }
    const std::vector<T> y = norm(final_gain);
    return {y.begin(), y.end()};
  }
};

struct Input {
  int tokens;
  std::vector<int64_t> ids;
  std::vector<uint8_t> mask;
  int batch() const { return static_cast<int>(mask.size()) / tokens; }
  std::vector<int> valid(int request) const {
    std::vector<int> at;
    for (int t = 0; t < tokens; ++t)
      if (mask[request * tokens + t]) at.push_back(t);
    return at;
  }
};

constexpr int64_t kPoison = 0x7fffffffffff;  // where no id may be read

Input random_input(const Case& c, int vocab, int batch, double mean, uint64_t seed) {
  std::mt19937_64 random(seed);
  Input in{c.tokens, {}, {}};
  for (int b = 0; b < batch; ++b) {
    int count = c.tokens;
    if (c.mask != Case::kFull && mean > 0) {
      const double u = static_cast<double>(random() % 10000) / 10000;
      count = std::clamp(static_cast<int>(2 * mean * u), 1, c.tokens);
    } else if (c.mask != Case::kFull) {
      count = b == 1 ? 0 : b == 2 ? c.tokens : static_cast<int>(random() % (c.tokens + 1));
    }
    for (int t = 0; t < c.tokens; ++t) {
      const bool valid =
          c.mask == Case::kAny ? random() % c.tokens < static_cast<uint64_t>(count) : t < count;
      in.mask.push_back(valid);
      in.ids.push_back(valid ? static_cast<int64_t>(random() % vocab) : kPoison);
    }
  }
  return in;
}

std::vector<uint16_t> encode(const T5View& view, const Input& in, EncodeForm form, int garbage) {
  Device device;
  EncodeT5Problem problem{};
  problem.model = view;
  problem.tokens = {device.copy(in.ids), device.copy(in.mask), in.batch(), in.tokens};
  std::vector<uint16_t> states(in.mask.size() * view.dim);
  problem.states = device.filled(states.size() * 2, garbage);
  if (const char* reason = why_not(problem)) throw std::runtime_error(reason);
  void* workspace = device.filled(workspace_bytes(problem, form), garbage);
  check(launch(problem, form, workspace, nullptr), "launch");
  check(cudaDeviceSynchronize(), "encode");
  check(cudaMemcpy(states.data(), problem.states, states.size() * 2, cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  return states;
}

// Requests `which` of `in`, with `more` masked tokens at the end of each.
Input pick(const Input& in, const std::vector<int>& which, int more) {
  Input out{in.tokens + more, {}, {}};
  for (const int b : which) {
    out.ids.insert(out.ids.end(), in.ids.begin() + b * in.tokens,
                   in.ids.begin() + (b + 1) * in.tokens);
    out.mask.insert(out.mask.end(), in.mask.begin() + b * in.tokens,
                    in.mask.begin() + (b + 1) * in.tokens);
    out.ids.insert(out.ids.end(), more, -kPoison);
    out.mask.insert(out.mask.end(), more, 0);
  }
  return out;
}

bool same_request(const std::vector<uint16_t>& a, int tokens_a, int at_a,
                  const std::vector<uint16_t>& b, int tokens_b, int at_b, int dim) {
  return memcmp(a.data() + static_cast<int64_t>(at_a) * tokens_a * dim,
                b.data() + static_cast<int64_t>(at_b) * tokens_b * dim,
                2 * static_cast<size_t>(std::min(tokens_a, tokens_b)) * dim) == 0;
}

constexpr EncodeForm kForms[] = {EncodeForm::kThroughput, EncodeForm::kCluster2,
                                 EncodeForm::kCluster4, EncodeForm::kCluster8};

int run_case(const Case& c, int only_form) {
  const Model model(c, 7 + c.tokens);
  Device device;
  const T5View view = model.view(device);
  Input in = random_input(c, model.vocab, c.batch, 0, 11);
  if (c.bad_id) in.ids[0] = model.vocab, in.mask[0] = 1;
  std::vector<std::vector<double>> wanted(in.batch()), rounded(in.batch());
  const int judged = c.tokens > 500 ? 1 : std::min(in.batch(), 4);
  for (int b = c.bad_id ? 1 : 0; b < judged; ++b) {
    const std::vector<int64_t> ids(in.ids.begin() + b * in.tokens,
                                   in.ids.begin() + (b + 1) * in.tokens);
    wanted[b] = model.reference<double>(ids, in.valid(b), false);
    rounded[b] = model.reference<float>(ids, in.valid(b), true);
  }
  int faults = 0;
  for (const EncodeForm form : kForms) {
    if (only_form != 0 && static_cast<int>(form) != only_form) continue;
    const std::vector<uint16_t> got = encode(view, in, form, 0xff);
    std::string wrong;
    double error = 0, yardstick = 0, size = 0;
    for (int b = 0; b < in.batch(); ++b) {
      const std::vector<int> at = in.valid(b);
      for (int t = 0, i = 0; t < in.tokens; ++t) {
        const bool valid = i < static_cast<int>(at.size()) && at[i] == t;
        for (int d = 0; d < c.dim; ++d) {
          const uint16_t bits = got[(static_cast<int64_t>(b) * in.tokens + t) * c.dim + d];
          const double x = widen(c.dtype, bits);
          if (!valid) {
            if (bits != 0 && wrong.empty()) wrong = "a masked state is not 0";
          } else if (c.bad_id && b == 0) {
            if (!std::isnan(x) && wrong.empty()) wrong = "an unknown id does not make NaN";
          } else if (!std::isfinite(x)) {
            wrong = "not finite: request " + std::to_string(b) + " token " + std::to_string(t);
          } else if (b < judged) {
            const double y = wanted[b][i * c.dim + d], z = rounded[b][i * c.dim + d];
            error += (x - y) * (x - y), yardstick += (z - y) * (z - y), size += y * y;
          }
        }
        if (valid) ++i;
      }
    }
    error = std::sqrt(error / size), yardstick = std::sqrt(yardstick / size);
    const double floor = c.dtype == DType::kBFloat16 ? 2e-3 : 2.5e-4;  // of the states' rounding
    if (!(error <= 2 * yardstick + floor)) wrong += " error";
    if (encode(view, in, form, 0x5a) != got) wrong += " garbage changes bits";
    std::vector<int> reversed;
    for (int b = in.batch() - 1; b >= 0; --b) reversed.push_back(b);
    const std::vector<uint16_t> other = encode(view, pick(in, reversed, 0), form, 0xff);
    const std::vector<uint16_t> longer = encode(view, pick(in, reversed, 19), form, 0xff);
    for (int b = 0; b < in.batch(); ++b) {
      const int at = in.batch() - 1 - b;
      if (!same_request(got, in.tokens, b, other, in.tokens, at, c.dim) && wrong.size() < 60)
        wrong += " order changes bits of " + std::to_string(b);
      if (!same_request(got, in.tokens, b, longer, in.tokens + 19, at, c.dim) && wrong.size() < 60)
        wrong += " padding changes bits of " + std::to_string(b);
      if (b % 7 == 0 &&
          !same_request(got, in.tokens, b, encode(view, pick(in, {b}, 0), form, 0xff), in.tokens, 0,
                        c.dim) &&
          wrong.size() < 60)
        wrong += " the batch changes bits of " + std::to_string(b);
    }
    printf("%-34s form %d  error %.5f  rounded reference %.5f  %s\n", c.name,
           static_cast<int>(form), error, yardstick, wrong.empty() ? "ok" : wrong.c_str());
    fflush(stdout);
    if (!wrong.empty()) ++faults;
  }
  return faults;
}

std::vector<Case> cases(bool small) {
  std::vector<Case> list;
  auto add = [&](const char* name) -> Case& {
    Case& c = list.emplace_back();
    c.name = name;
    return c;
  };
  {
    Case& c = add("published, ragged");
    c.batch = small ? 3 : 9, c.layers = small ? 1 : 4;
  }
  {
    Case& c = add("small, any mask, gelu, fp16");
    c.dtype = DType::kFloat16, c.dim = 64, c.heads = 4, c.head_dim = 16, c.ffn = 80, c.layers = 2;
    c.activation = Activation::kGelu, c.tokens = 37, c.mask = Case::kAny, c.batch = 5;
  }
  for (const int head_dim : {64, 32}) {
    Case& c = add(head_dim == 64 ? "gelu, bf16, wgmma" : "gelu, bf16, mma");
    c.dim = 128, c.heads = 2, c.head_dim = head_dim, c.ffn = 128, c.layers = 1;
    c.activation = Activation::kGelu, c.tokens = 30, c.batch = 4;
  }
  {
    Case& c = add("heads of 48, gated relu");
    c.dim = 112, c.heads = 3, c.head_dim = 48, c.ffn = 208, c.layers = 2;
    c.activation = Activation::kGatedRelu, c.tokens = 20, c.batch = 8, c.mask = Case::kAny;
  }
  {
    Case& c = add("unknown id, gated gelu");
    c.activation = Activation::kGatedGelu, c.bad_id = true, c.tokens = 40, c.layers = 2;
    c.dim = 64, c.heads = 2, c.ffn = 96;
  }
  {
    Case& c = add("long, one layer of 48");
    c.dim = 48, c.heads = 2, c.head_dim = 16, c.ffn = 64, c.layers = 1, c.tokens = 150;
    c.mask = Case::kAny;
  }
  if (small) return list;
  {
    Case& c = add("published, full, fp16");
    c.dtype = DType::kFloat16, c.mask = Case::kFull, c.batch = 2;
  }
  {
    Case& c = add("published, 700 requests");
    c.batch = 700, c.layers = 2;
  }
  {
    Case& c = add("wide, heads of 128");
    c.dim = 512, c.heads = 8, c.head_dim = 128, c.ffn = 1536, c.layers = 2, c.tokens = 70;
  }
  {
    Case& c = add("256 wide, 1000 tokens");
    c.dim = 256, c.heads = 4, c.ffn = 1024, c.layers = 2, c.tokens = 1000, c.mask = Case::kAny;
  }
  {
    Case& c = add("tokens of 8, 5000 requests");
    c.dim = 64, c.heads = 2, c.head_dim = 32, c.ffn = 128, c.layers = 1, c.tokens = 8;
    c.batch = 5000;
  }
  return list;
}

float replay_time(const EncodeT5Problem& problem, EncodeForm form, void* workspace) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream), "stream");
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  check(launch(problem, form, workspace, stream), "launch");
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  std::vector<float> times;
  const int64_t work = problem.tokens.batch * problem.tokens.tokens;
  const int replays = work > 100000 ? 5 : work > 10000 ? 20 : 50;
  for (int i = 0; i < 7; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    for (int r = 0; r < replays; ++r) check(cudaGraphLaunch(exec, stream), "replay");
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "replays");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(1000 * ms / replays);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

void time_all(int only_form, int only_batch) {
  for (const double mean : {0.0, 34.0}) {
    Case c;
    c.mask = mean > 0 ? Case::kPrefix : Case::kFull;
    const Model model(c, 3);
    Device device;
    const T5View view = model.view(device);
    printf("%s\nbatch", mean > 0 ? "tokens of mean 34, at most 82" : "82 tokens each");
    for (const EncodeForm form : kForms) printf("   form %d", static_cast<int>(form));
    printf("   microseconds of a graph replay\n");
    for (const int batch : {1, 8, 15, 32, 66, 128, 512, 4096}) {
      if (only_batch != 0 && batch != only_batch) continue;
      Device arrays;
      const Input in = random_input(c, model.vocab, batch, mean, 5);
      EncodeT5Problem problem{};
      problem.model = view;
      problem.tokens = {arrays.copy(in.ids), arrays.copy(in.mask), batch, c.tokens};
      problem.states = arrays.filled(in.mask.size() * c.dim * 2, 0xff);
      printf("%5d", batch);
      for (const EncodeForm form : kForms) {
        if ((only_form != 0 && static_cast<int>(form) != only_form) ||
            (form != EncodeForm::kThroughput && batch > 128)) {
          printf("        -");
          continue;
        }
        void* workspace = arrays.filled(workspace_bytes(problem, form), 0);
        printf("%9.1f", replay_time(problem, form, workspace));
      }
      printf("\n");
      fflush(stdout);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool small = false, time = false;
  int form = 0, batch = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--small") {
      small = true;
    } else if (option == "--time") {
      time = true;
    } else if (option == "--form" && i + 1 < argc) {
      form = std::atoi(argv[++i]);
    } else if (option == "--batch" && i + 1 < argc) {
      batch = std::atoi(argv[++i]);
    } else {
      fprintf(stderr, "usage: encode_check [--small] [--time] [--form N] [--batch N]\n");
      return 2;
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return kNoDevice;
  try {
    if (time) {
      time_all(form, batch);
      return 0;
    }
    int faults = 0;
    for (const Case& c : cases(small)) faults += run_case(c, form);
    printf(faults == 0 ? "all hold\n" : "%d do not hold\n", faults);
    return faults == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    fprintf(stderr, "encode_check: %s\n", error.what());
    return 1;
  }
}

}  // namespace sidmlp::native

int main(int argc, char** argv) { return sidmlp::native::main(argc, argv); }

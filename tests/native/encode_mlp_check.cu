// encode_mlp_check: the CUDA kernel of SID-MLP++'s encoder against an fp64 reference on seeded
// problems, without torch and Python, for compute-sanitizer and for debuggers.
//
//     encode_mlp_check        a fixed list of cases, every form of each
//       --small               short cases in two forms, for a sanitizer
//       --time                microseconds of graph replays at the published sizes instead
//
// For each case and form: the relative error against the reference, at most twice that of the same
// mathematics with the kernel's roundings in half precision (fp32: 2e-6); the same bits in every
// form, for a request alone, elsewhere in the batch, with more padding, and from a workspace of
// NaNs; masked states are zeros, a request with an unknown id is NaN. Exit status 0: all hold, 1:
// some do not, 77: no CUDA device, 2: usage.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "cuda/sm90/mlp_encoder/encode_mlp.h"
#include "native/device_arrays.h"

namespace sidmlp::native {

namespace {

using cuda::sm90::EncodeMlpProblem;
using Bytes = std::vector<unsigned char>;

constexpr int kNoGpu = 77;
constexpr int64_t kPoison = 0x7fffffffffff;  // where no id may be read
constexpr int kForms[] = {1, 2, 4, 8, 0};

struct MlpCase {
  const char* name;
  DType dtype = DType::kBFloat16;
  int dim = 128, hidden = 512, layers = 4, roles = 4, tokens = 82, batch = 3;
  enum Mask { kFull, kPrefix, kAny } mask = kPrefix;
  bool bad_id = false;
};

size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void store(DType dtype, unsigned char* to, float x) {
  if (dtype == DType::kFloat32) {
    memcpy(to, &x, 4);
  } else if (dtype == DType::kBFloat16) {
    const __nv_bfloat16 y = __float2bfloat16_rn(x);
    memcpy(to, &y, 2);
  } else {
    const __half y = __float2half_rn(x);
    memcpy(to, &y, 2);
  }
}
float load(DType dtype, const unsigned char* from) {
  float x;
  if (dtype == DType::kFloat32) {
    memcpy(&x, from, 4);
    return x;
  }
  if (dtype == DType::kBFloat16) {
    __nv_bfloat16 y;
    memcpy(&y, from, 2);
    return __bfloat162float(y);
  }
  __half y;
  memcpy(&y, from, 2);
  return __half2float(y);
}
float rounded(DType dtype, double x) {
  unsigned char bytes[4];
  store(dtype, bytes, static_cast<float>(x));
  return load(dtype, bytes);
}

int64_t up(int n) { return padded(n); }

// [rows, columns] as rounded.
struct Matrix {
  int rows, columns;
  std::vector<float> values;
  float at(int row, int column) const {
    return values[static_cast<int64_t>(row) * columns + column];
  }
};

struct RoleLayer {
  Matrix token, mean, out;
  std::vector<float> bias_in, gain, shift, bias_out;
};

struct Model {
  MlpCase c;
  int vocab = 300, max_length;
  Matrix embedding, positions;
  std::vector<float> gain, shift;
  std::vector<std::vector<RoleLayer>> layers;

  explicit Model(const MlpCase& sizes) : c(sizes), max_length(sizes.tokens + 40) {
    std::mt19937_64 random(7 + c.tokens + c.dim);
    std::normal_distribution<float> normal;
    auto vector = [&](int n, float base, float scale) {
      std::vector<float> x(n);
      for (float& v : x) v = base + scale * normal(random);
      return x;
    };
    auto matrix = [&](int rows, int columns, float scale) {
      Matrix m{rows, columns, vector(rows * columns, 0, scale)};
      for (float& v : m.values) v = rounded(c.dtype, v);
      return m;
    };
    embedding = matrix(vocab, c.dim, 1), positions = matrix(max_length, c.dim, 0.5f);
    gain = vector(c.dim, 1, 0.2f), shift = vector(c.dim, 0, 0.2f);
    for (int l = 0; l < c.layers; ++l) {
      auto& roles = layers.emplace_back();
      for (int r = 0; r < c.roles; ++r) {
        const float in = 1 / std::sqrt(2.0f * c.dim), out = 1 / std::sqrt(1.0f * c.hidden);
        roles.push_back({matrix(c.hidden, c.dim, in), matrix(c.hidden, c.dim, in),
                         matrix(c.dim, c.hidden, out), vector(c.hidden, 0, 0.2f),
                         vector(c.hidden, 1, 0.2f), vector(c.hidden, 0, 0.2f),
                         vector(c.dim, 0, 0.2f)});
      }
    }
  }

  Bytes rows(const Matrix& m) const {
    Bytes bytes(m.rows * up(m.columns) * size_of(c.dtype), 0);
    for (int i = 0; i < m.rows; ++i)
      for (int j = 0; j < m.columns; ++j)
        store(c.dtype, &bytes[(i * up(m.columns) + j) * size_of(c.dtype)], m.at(i, j));
    return bytes;
  }
  // As mlp_encoder_view.h says.
  void add_fragments(const Matrix& m, Bytes& to) const {
    const int64_t steps = up(m.columns) / 16, begin = static_cast<int64_t>(to.size());
    to.resize(begin + up(m.rows) * up(m.columns) * size_of(c.dtype), 0);
    for (int n = 0; n < m.rows; ++n)
      for (int k = 0; k < m.columns; ++k) {
        const int a = n % 16, b = k % 16;
        const int at = c.dtype == DType::kFloat32
                           ? 64 * (b / 4) + 16 * (a % 8 / 2) + 8 * (a / 8) + 4 * (a % 2) + b % 4
                           : 8 * (4 * (a % 8) + b % 8 / 2) + 4 * (a / 8) + 2 * (b / 8) + b % 2;
        const int64_t block = n / 16 * steps + k / 16;
        store(c.dtype, &to[begin + (256 * block + at) * size_of(c.dtype)], m.at(n, k));
      }
  }

  MlpView view(DeviceArrays& device) const {
    auto copy = [&](const auto& x) { return device.copy_of(x.data(), x.size() * sizeof(x[0])); };
    auto add = [](const std::vector<float>& from, int64_t width, std::vector<float>& to) {
      const auto begin = static_cast<int64_t>(to.size());
      to.resize(begin + width, 0.0f);
      std::copy(from.begin(), from.end(), to.begin() + begin);
    };
    MlpView v{};
    v.dtype = c.dtype, v.num_layers = c.layers, v.num_roles = c.roles, v.dim = c.dim;
    v.hidden_dim = c.hidden, v.vocab_size = vocab, v.max_length = max_length, v.eps = 1e-5f;
    v.embedding = copy(rows(embedding)), v.positions = copy(rows(positions));
    std::vector<float> norm;
    add(gain, up(c.dim), norm), add(shift, up(c.dim), norm);
    v.norm = static_cast<const float*>(copy(norm));
    for (int l = 0; l < c.layers; ++l) {
      Bytes token, mean, out;
      std::vector<float> vectors, bias;
      for (const RoleLayer& r : layers[l]) {
        add_fragments(r.token, token), add_fragments(r.mean, mean), add_fragments(r.out, out);
        add(r.bias_in, up(c.hidden), vectors), add(r.gain, up(c.hidden), vectors);
        add(r.shift, up(c.hidden), vectors), add(r.bias_out, up(c.dim), bias);
      }
      v.layers[l] = {copy(token), copy(mean), static_cast<const float*>(copy(vectors)), copy(out),
                     static_cast<const float*>(copy(bias))};
    }
    return v;
  }

  // States of the valid tokens `at`, [tokens, D]; `rounds`: where the kernel does.
  std::vector<double> reference(const std::vector<int64_t>& ids, const std::vector<int>& at,
                                bool rounds) const {
    const int n = static_cast<int>(at.size());
    auto round = [&](double x) { return rounds ? rounded(c.dtype, x) : x; };
    auto norm = [&](std::vector<double>& x, const std::vector<float>& g,
                    const std::vector<float>& s) {
      double mean = 0, squares = 0;
      for (const double v : x) mean += v / x.size();
      for (const double v : x) squares += (v - mean) * (v - mean) / x.size();
      for (size_t i = 0; i < x.size(); ++i)
        x[i] = (x[i] - mean) / std::sqrt(squares + 1e-5) * g[i] + s[i];
    };
    auto multiply = [&](const Matrix& m, const std::vector<double>& x, std::vector<double>& to) {
      for (int i = 0; i < m.rows; ++i)
        for (int j = 0; j < m.columns; ++j) to[i] += m.at(i, j) * round(x[j]);
    };
    std::vector<std::vector<double>> x(n, std::vector<double>(c.dim));
    for (int i = 0; i < n; ++i)
      for (int d = 0; d < c.dim; ++d)
        x[i][d] = embedding.at(static_cast<int>(ids[at[i]]), d) + positions.at(at[i], d);
    for (int l = 0; l < c.layers; ++l) {
      std::vector<double> mean(c.dim, 0);
      for (const auto& row : x)
        for (int d = 0; d < c.dim; ++d) mean[d] += row[d] / n;
      for (int i = 0; i < n; ++i) {
        const int role = i == n - 1 ? c.roles - 1 : (at[i] + c.roles - 1) % c.roles;
        const RoleLayer& r = layers[l][role];
        std::vector<double> hidden(r.bias_in.begin(), r.bias_in.end());
        multiply(r.token, x[i], hidden), multiply(r.mean, mean, hidden);
        for (double& v : hidden) v = round(v);
        norm(hidden, r.gain, r.shift);
        for (double& v : hidden) v = 0.5 * v * (1 + std::erf(v * M_SQRT1_2));
        std::vector<double> out(r.bias_out.begin(), r.bias_out.end());
        multiply(r.out, hidden, out);
        for (int d = 0; d < c.dim; ++d) x[i][d] += out[d];
      }
    }
    std::vector<double> states;
    for (auto& row : x) {
      norm(row, gain, shift);
      for (const double v : row) states.push_back(round(v));
    }
    return states;
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

Input random_input(const MlpCase& c, int vocab, int batch, double mean) {
  std::mt19937_64 random(11);
  Input in{c.tokens, {}, {}};
  for (int b = 0; b < batch; ++b) {
    int count = c.tokens;
    if (c.mask != MlpCase::kFull && mean > 0) {
      count = std::clamp(static_cast<int>(2 * mean * (random() % 10000) / 10000), 1, c.tokens);
    } else if (c.mask != MlpCase::kFull) {
      count = b == 1 ? 0 : b == 2 ? c.tokens : static_cast<int>(random() % (c.tokens + 1));
    }
    for (int t = 0; t < c.tokens; ++t) {
      const bool valid =
          c.mask == MlpCase::kAny ? random() % c.tokens < static_cast<uint64_t>(count) : t < count;
      in.mask.push_back(valid);
      in.ids.push_back(valid ? static_cast<int64_t>(random() % vocab) : kPoison);
    }
  }
  return in;
}

// Requests `which` of `in`, with `more` masked tokens at the end of each.
Input pick(const Input& in, const std::vector<int>& which, int more) {
  Input out{in.tokens + more, {}, {}};
  for (const int b : which) {
    const auto begin = b * in.tokens, end = begin + in.tokens;
    out.ids.insert(out.ids.end(), in.ids.begin() + begin, in.ids.begin() + end);
    out.mask.insert(out.mask.end(), in.mask.begin() + begin, in.mask.begin() + end);
    out.ids.insert(out.ids.end(), more, -kPoison);
    out.mask.insert(out.mask.end(), more, 0);
  }
  return out;
}

EncodeMlpProblem problem_of(const MlpView& view, const Input& in, DeviceArrays& device) {
  EncodeMlpProblem problem{};
  problem.model = view;
  problem.tokens = {static_cast<const int64_t*>(device.copy_of(in.ids.data(), in.ids.size() * 8)),
                    static_cast<const uint8_t*>(device.copy_of(in.mask.data(), in.mask.size())),
                    in.batch(), in.tokens};
  problem.states = device.filled(in.mask.size() * view.dim * size_of(view.dtype), 0xff);
  if (const char* reason = why_not(problem)) throw std::runtime_error(reason);
  return problem;
}

Bytes encode(const MlpView& view, const Input& in, int form, int garbage) {
  DeviceArrays device;
  const EncodeMlpProblem problem = problem_of(view, in, device);
  void* workspace = device.filled(mlp_shape(problem, form).workspace_bytes, garbage);
  check(launch(problem, form, workspace, nullptr), "launch");
  check(cudaDeviceSynchronize(), "encode");
  Bytes states(in.mask.size() * view.dim * size_of(view.dtype));
  copy_back(states, problem.states);
  return states;
}

int run_case(const MlpCase& c, bool small) {
  const Model model(c);
  DeviceArrays device;
  const MlpView view = model.view(device);
  Input in = random_input(c, model.vocab, c.batch, 0);
  if (c.bad_id) in.ids[0] = model.vocab, in.mask[0] = 1;
  const int judged = c.tokens > 500 ? 1 : std::min(in.batch(), 4);
  const size_t row = c.dim * size_of(c.dtype);
  double error = 0, yardstick = 0, size = 0;
  std::string wrong;
  const Bytes got = encode(view, in, 1, 0xff);
  for (int b = 0; b < in.batch(); ++b) {
    const std::vector<int> at = in.valid(b);
    std::vector<double> wanted, rough;
    if (b < judged && !(c.bad_id && b == 0)) {
      const std::vector<int64_t> ids(in.ids.begin() + b * in.tokens,
                                     in.ids.begin() + (b + 1) * in.tokens);
      wanted = model.reference(ids, at, false), rough = model.reference(ids, at, true);
    }
    for (int t = 0, i = 0; t < in.tokens; ++t) {
      const bool valid = i < static_cast<int>(at.size()) && at[i] == t;
      for (int d = 0; d < c.dim; ++d) {
        const unsigned char* from =
            &got[(static_cast<int64_t>(b) * in.tokens + t) * row + d * size_of(c.dtype)];
        const double x = load(c.dtype, from);
        if (!valid) {
          if (x != 0) wrong = "a masked state is not 0";
        } else if (c.bad_id && b == 0) {
          if (!std::isnan(x)) wrong = "an unknown id does not make NaN";
        } else if (!std::isfinite(x)) {
          wrong = "not finite: request " + std::to_string(b) + " token " + std::to_string(t);
        } else if (!wanted.empty()) {
          const double y = wanted[i * c.dim + d], z = rough[i * c.dim + d];
          error += (x - y) * (x - y), yardstick += (z - y) * (z - y), size += y * y;
        }
      }
      if (valid) ++i;
    }
  }
  error = std::sqrt(error / size), yardstick = std::sqrt(yardstick / size);
  if (!(error <= 2 * yardstick + (c.dtype == DType::kFloat32 ? 2e-6 : 0))) wrong += " error";
  std::vector<int> reversed;
  for (int b = in.batch() - 1; b >= 0; --b) reversed.push_back(b);
  for (const int form : kForms) {
    if (small && form != 4) continue;
    const std::string at = " in form " + std::to_string(form);
    if (encode(view, in, form, 0x5a) != got) wrong += " other bits" + at;
    const Bytes other = encode(view, pick(in, reversed, 0), form, 0xff);
    const Bytes longer = encode(view, pick(in, reversed, 19), form, 0xff);
    for (int b = 0; b < in.batch() && wrong.size() < 200; ++b) {
      const size_t bytes = in.tokens * row;
      const unsigned char* own = &got[b * bytes];
      const int mirror = in.batch() - 1 - b;
      if (memcmp(own, &other[mirror * bytes], bytes) != 0) wrong += " order changes bits" + at;
      if (memcmp(own, &longer[mirror * (bytes + 19 * row)], bytes) != 0)
        wrong += " padding changes bits" + at;
      if (b % std::max(7, in.batch() / 50) == 0 &&
          memcmp(own, encode(view, pick(in, {b}, 0), form, 0xff).data(), bytes) != 0)
        wrong += " the batch changes bits" + at;
    }
  }
  printf("%-34s error %.3g  rounded reference %.3g  %s\n", c.name, error, yardstick,
         wrong.empty() ? "ok" : wrong.c_str());
  fflush(stdout);
  return wrong.empty() ? 0 : 1;
}

std::vector<MlpCase> cases(bool small) {
  const DType bf16 = DType::kBFloat16, fp16 = DType::kFloat16, fp32 = DType::kFloat32;
  std::vector<MlpCase> list{
      {"published, ragged", bf16, 128, 512, small ? 1 : 4, 4, small ? 40 : 82, small ? 3 : 9},
      {"published, fp32", fp32, 128, 512, 1, 4, 30, 3},
      {"odd sizes, any mask, fp16", fp16, 20, 33, 3, 3, 37, 5, MlpCase::kAny},
      {"odd sizes, any mask, fp32", fp32, 37, 50, 2, 3, 25, 4, MlpCase::kAny},
      {"unknown id", bf16, 24, 40, 2, 4, 20, 4, MlpCase::kPrefix, true},
      {"one role", bf16, 16, 16, 1, 1, 130, 3, MlpCase::kAny},
      {"eight roles, 40 short requests", fp16, 48, 80, 2, 8, 12, 40},
  };
  if (small) return list;
  list.push_back({"published, full, fp16", fp16, 128, 512, 4, 4, 82, 2, MlpCase::kFull});
  list.push_back({"published, 700 requests", bf16, 128, 512, 2, 4, 82, 700});
  list.push_back({"wide", bf16, 512, 2048, 2, 4, 70, 3});
  list.push_back({"wide, fp32", fp32, 512, 2048, 1, 2, 30, 2});
  list.push_back({"1,500 tokens", bf16, 64, 256, 2, 4, 1500, 3, MlpCase::kAny});
  list.push_back({"5,000 requests of 8", bf16, 64, 128, 1, 4, 8, 5000});
  return list;
}

float replay_time(const EncodeMlpProblem& problem, int form, void* workspace) {
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
  const int replays = problem.tokens.batch > 1000 ? 10 : 50;
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

void time_all() {
  for (const double mean : {0.0, 34.0}) {
    MlpCase c;
    c.mask = mean > 0 ? MlpCase::kPrefix : MlpCase::kFull;
    const Model model(c);
    DeviceArrays device;
    const MlpView view = model.view(device);
    printf("%s; microseconds of a graph replay by form\nbatch      1      2      4\n",
           mean > 0 ? "tokens of mean 34, at most 82" : "82 tokens each");
    for (const int batch : {1, 8, 30, 32, 64, 128, 256, 512, 1024, 4096}) {
      DeviceArrays arrays;
      const EncodeMlpProblem problem =
          problem_of(view, random_input(c, model.vocab, batch, mean), arrays);
      printf("%5d", batch);
      for (const int form : {1, 2, 4}) {
        void* workspace = arrays.filled(mlp_shape(problem, form).workspace_bytes, 0);
        printf(" %6.1f", replay_time(problem, form, workspace));
      }
      printf("\n");
      fflush(stdout);
    }
  }
}

}  // namespace

int mlp_main(int argc, char** argv) {
  bool small = false, time = false;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option != "--small" && option != "--time") {
      fprintf(stderr, "usage: encode_mlp_check [--small] [--time]\n");
      return 2;
    }
    (option == "--small" ? small : time) = true;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return kNoGpu;
  try {
    if (time) {
      time_all();
      return 0;
    }
    int faults = 0;
    for (const MlpCase& c : cases(small)) faults += run_case(c, small);
    printf(faults == 0 ? "all hold\n" : "%d do not hold\n", faults);
    return faults == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    fprintf(stderr, "encode_mlp_check: %s\n", error.what());
    return 1;
  }
}

}  // namespace sidmlp::native

int main(int argc, char** argv) { return sidmlp::native::mlp_main(argc, argv); }

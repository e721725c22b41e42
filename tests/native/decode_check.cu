// decode_check: the CUDA kernels against the CPU's on seeded problems, without torch and Python,
// for compute-sanitizer and for debuggers. `make sanitize` builds and runs it.
//
//     decode_check                  a fixed list of cases
//     decode_check --cases 100      random ones, from --seed (default 1)
//       --dtype fp32|bf16|fp16      every case in this dtype
//       --hidden H                  every case with heads of this width
//       --small                     without cases and sizes that take long under a sanitizer
//       --self-test                 the plain CPU kernels in the GPU's place: tests this program
//
// For each case: results of both within what the CPU's logits allow (judge.h), contexts and logits
// of the other two operators within their bounds, and the same bits from a workspace of NaNs and
// for a request alone. Exit status 0: all hold, 1: some do not, 77: no CUDA device, 2: usage.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "native/device.h"
#include "native/judge.h"
#include "native/problem.h"

namespace sidmlp::native {

namespace {

constexpr int kNoDevice = 77;  // as automake's tests say "skipped"

struct Options {
  int cases = 0;  // 0: the fixed list
  uint64_t seed = 1;
  std::optional<DType> dtype;
  int hidden_dim = 0;
  bool small = false, self_test = false;
};

std::vector<Case> fixed_cases(bool small) {
  std::vector<Case> cases;
  auto add = [&](const char* name, DType dtype, std::vector<int> codes) -> Case& {
    Case& c = cases.emplace_back();
    c.name = name, c.dtype = dtype, c.codes = std::move(codes), c.seed = cases.size();
    return c;
  };
  constexpr DType fp32 = DType::kFloat32, bf16 = DType::kBFloat16, fp16 = DType::kFloat16;
  {
    Case& c = add("one level", fp32, {40});
    c.batch = 1, c.hidden_dim = 32, c.num_items = 90;
  }
  {
    Case& c = add("three levels, exclusion, stock", fp32, {12, 17, 9});
    c.excluded = 60, c.unavailable = 0.3, c.num_beams = 25, c.k = 7;
  }
  {
    Case& c = add("only children", bf16, {250, 20, 9});
    c.batch = 17, c.only_children = true, c.num_items = 60, c.num_beams = 32, c.k = 32;
  }
  {
    Case& c = add("five levels", fp16, {5, 4, 3, 4, 5});
    c.batch = 40, c.num_beams = 20, c.k = 20, c.excluded = 20;
  }
  {
    Case& c = add("states, product form", fp32, {16, 16, 16});
    c.batch = 17, c.tokens = 12, c.head_dim = 32, c.excluded = 5;
  }
  {
    Case& c = add("states, factored form", bf16, {16, 16, 16});
    c.batch = 40, c.tokens = 30, c.dim = 64, c.head_dim = 6, c.factored = true;
  }
  {
    Case& c = add("fewer items than k", fp16, {6, 5, 4});
    c.num_items = 30, c.num_beams = 100, c.k = 100, c.unavailable = 0.2, c.excluded = 10;
  }
  {
    Case& c = add("codebook, temperatures, weights", bf16, {20, 30, 17, 8});
    c.codebook = c.tuned = true, c.num_beams = 25, c.hidden_dim = 128, c.k = 25;
  }
  {
    Case& c = add("odd widths, three blocks", fp32, {9, 33, 17});
    c.dim = 30, c.hidden_dim = 100, c.num_blocks = 3, c.tuned = true;
  }
  {
    Case& c = add("two blocks, D 16", bf16, {24, 24});
    c.dim = 16, c.hidden_dim = 96, c.num_blocks = 2, c.batch = 17, c.num_beams = 64, c.k = 10;
  }
  {
    Case& c = add("a request that is not finite", bf16, {16, 16, 16});
    c.broken = true, c.tokens = 9, c.batch = 8;
  }
  {
    Case& c = add("50 beams of 4 x 256 codes", bf16, {256, 256, 256, 256});
    c.dim = 128, c.hidden_dim = 512, c.num_items = 5000, c.num_beams = 50, c.excluded = 100;
    c.batch = small ? 3 : 40;
  }
  {
    Case& c = add("129 beams, codebook", fp16, {40, 30, 20});
    c.num_beams = 129, c.k = 50, c.hidden_dim = 96, c.codebook = c.tuned = true;
    c.num_items = 3000, c.batch = 9;
  }
  {
    Case& c = add("512 beams, exclusion, from states", bf16, {60, 50, 20});
    c.num_beams = c.k = 512, c.num_items = small ? 4000 : 9000, c.excluded = 100;
    c.unavailable = 0.2, c.tokens = 9, c.batch = small ? 2 : 20;
  }
  {
    Case& c = add("8192 codes", bf16, {8192, 8192, 300});
    c.hidden_dim = 32, c.num_items = 20000, c.num_beams = 20, c.k = 20, c.broken = true;
  }
  {
    Case& c = add("nodes with thousands of children", fp16, {2, 3000, 9});
    c.num_items = 6000, c.num_beams = 60, c.k = 20, c.batch = 5;
  }
  if (small) return cases;
  {
    Case& c = add("257 beams of 4 x 256 codes", bf16, {256, 256, 256, 256});
    c.dim = 128, c.hidden_dim = 512, c.num_items = 20000, c.num_beams = 257, c.k = 100;
    c.batch = 20;
  }
  {
    Case& c = add("codebook of 3 x 2000 codes", bf16, {1025, 2000, 1500});
    c.dim = 64, c.hidden_dim = 544, c.num_items = 20000, c.num_beams = 50, c.k = 20, c.batch = 5;
    c.codebook = true;
  }
  {
    Case& c = add("only children of 300 beams, H 2048", fp16, {1100, 20, 9});
    c.hidden_dim = 2048, c.only_children = true, c.num_items = 900, c.num_beams = 300, c.k = 20;
  }
  {
    Case& c = add("50 beams, fp32, from states", fp32, {256, 256, 256, 256});
    c.dim = 128, c.hidden_dim = 512, c.num_items = 5000, c.num_beams = 50, c.k = 50;
    c.tokens = 82, c.head_dim = 96, c.ffn_dim = 1024;
  }
  return cases;
}

std::vector<Case> random_cases(const Options& options) {
  std::mt19937_64 random(options.seed);
  auto pick = [&](int low, int high) {
    return low + static_cast<int>(random() % static_cast<uint64_t>(high - low + 1));
  };
  auto chance = [&](int percent) { return pick(1, 100) <= percent; };
  std::vector<Case> cases;
  for (int n = 0; n < options.cases; ++n) {
    Case& c = cases.emplace_back();
    c.seed = random();
    c.dtype = static_cast<DType>(pick(0, 2));
    c.codes.resize(pick(1, 5));
    for (int& size : c.codes) size = pick(2, chance(20) ? 300 : 40);
    c.dim = 8 * pick(2, options.small ? 8 : 32);
    c.hidden_dim = chance(80) ? 32 * pick(1, options.small ? 4 : 24) : pick(8, 200);
    c.num_blocks = chance(80) ? 1 : pick(2, 3);
    c.num_items = pick(1, options.small ? 300 : 3000);
    c.only_children = chance(20);
    c.batch = chance(50) ? pick(1, 4) : pick(1, options.small ? 18 : 70);
    c.num_beams = pick(1, options.small ? 32 : 128);
    c.k = pick(1, c.num_beams);
    c.codebook = chance(25), c.tuned = chance(25);
    c.excluded = chance(50) ? pick(1, 60) : 0;
    c.unavailable = chance(30) ? 0.3 : 0.0;
    c.broken = chance(10);
    if (chance(40)) {
      c.tokens = pick(1, 40), c.factored = chance(50), c.num_heads = pick(1, 4);
      c.head_dim = pick(1, 32), c.ffn_dim = pick(8, 200);
    }
    std::string sizes;
    for (const int size : c.codes) sizes += (sizes.empty() ? "" : "x") + std::to_string(size);
    c.name = "random " + std::to_string(n) + ", codes " + sizes;
  }
  return cases;
}

std::string differences(const Results& got, const Results& wanted, const char* what) {
  const bool equal =
      got.items == wanted.items && got.codes == wanted.codes && got.counts == wanted.counts &&
      got.scores.size() == wanted.scores.size() &&
      memcmp(got.scores.data(), wanted.scores.data(), got.scores.size() * sizeof(float)) == 0;
  return equal ? "" : std::string(what) + ": expected the same bits\n";
}

// The row of one request.
Results row_of(const Results& results, const Problem& p, int request) {
  const int64_t k = p.sizes.k, codes = k * p.num_levels();
  Results row(p);
  auto cut = [request](auto& to, const auto& from, int64_t width) {
    to.assign(from.begin() + request * width, from.begin() + (request + 1) * width);
  };
  cut(row.items, results.items, k);
  cut(row.scores, results.scores, k);
  cut(row.codes, results.codes, codes);
  cut(row.counts, results.counts, 1);
  return row;
}

std::string distance(const std::vector<float>& got, const std::vector<float>& wanted,
                     double allowed, const std::string& what) {
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (!std::isfinite(wanted[i])) continue;  // of a request that is not finite
    const double error = std::abs(static_cast<double>(got[i]) - wanted[i]);
    worst = error <= worst ? worst : error;  // a NaN stays
  }
  if (worst <= allowed) return "";
  return what + ": off by " + std::to_string(worst) + ", allowed " + std::to_string(allowed) + "\n";
}

// The operators that are parts of the decode.
std::string faults_of_parts(const Problem& p, const CudaDecoder& cuda, CpuDecoder& cpu) {
  const Case& s = p.sizes;
  std::string faults;
  if (p.from_states())
    faults += distance(cuda.contexts(), cpu.contexts(), context_tolerance(s), "contexts");
  for (int level = 0; level < p.num_levels(); ++level) {
    std::vector<int32_t> prefixes;
    for (int b = 0; b < s.batch; ++b)
      for (int j = 0; j < level; ++j) prefixes.push_back((7 * b + 3 * j) % s.codes[j]);
    std::vector<float> wanted;
    for (int b = 0; b < s.batch; ++b) {
      const std::vector<float> row =
          cpu.logits(level, cpu.context(b), prefixes.data() + static_cast<int64_t>(b) * level);
      wanted.insert(wanted.end(), row.begin(), row.end());
    }
    faults += distance(cuda.logits(level, cpu.contexts(), prefixes), wanted, logit_tolerance(s),
                       "logits of level " + std::to_string(level + 1));
  }
  return faults;
}

// Faults of everything about one case; "" for none.
std::string run_case(const Case& sizes, bool self_test, double* worst) {
  const Problem problem = make_problem(sizes);
  CpuDecoder cpu(problem, cpu::select_kernels(cpu::Isa::kAuto));
  const Results theirs = cpu.decode();
  std::optional<CudaDecoder> cuda;
  if (!self_test) cuda.emplace(problem);
  const Results ours = self_test
                           ? CpuDecoder(problem, cpu::select_kernels(cpu::Isa::kPlain)).decode()
                           : cuda->decode(false, 0, sizes.batch);
  std::string faults;
  double ignored = 0;
  for (int request = 0; request < sizes.batch; ++request) {
    const RequestJudge judge(problem, cpu, request);
    const std::string at = "request " + std::to_string(request) + ", ";
    const std::string of_cpu = judge.faults(theirs, &ignored),
                      of_kernel = judge.faults(ours, worst);
    if (!of_cpu.empty()) faults += at + "CPU:\n" + of_cpu;
    if (!of_kernel.empty()) faults += at + "kernel:\n" + of_kernel;
  }
  // Half precision may lose a near tie whose children are fewer than its rival's.
  if (sizes.dtype == DType::kFloat32 && ours.counts != theirs.counts)
    faults += "counts: expected the CPU's\n";
  if (self_test) return faults;
  faults += differences(cuda->decode(true, 0, sizes.batch), ours, "with a workspace of NaNs");
  const int last = sizes.batch - 1;
  faults += differences(cuda->decode(false, last, 1), row_of(ours, problem, last),
                        "the last request alone");
  if (cuda->takes_two_launches()) {
    faults += differences(cuda->decode(false, 0, sizes.batch, 2), ours, "in two launches");
    faults += differences(cuda->decode(true, last, 1, 2), row_of(ours, problem, last),
                          "in two launches, the last request alone, with a workspace of NaNs");
  }
  return faults + faults_of_parts(problem, *cuda, cpu);
}

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "fp32" : dtype == DType::kBFloat16 ? "bf16" : "fp16";
}

[[noreturn]] void usage(const std::string& problem) {
  fprintf(stderr,
          "decode_check: %s\nusage: decode_check [--cases N] [--seed S] [--dtype fp32|bf16|fp16] "
          "[--hidden H] [--small] [--self-test]\n",
          problem.c_str());
  exit(2);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    auto value = [&]() -> std::string {
      if (i + 1 == argc) usage(flag + ": expected a value");
      return argv[++i];
    };
    auto number = [&](int64_t low, int64_t high) {
      const std::string text = value();
      char* end = nullptr;
      const int64_t found = strtoll(text.c_str(), &end, 10);
      if (text.empty() || *end != '\0' || found < low || found > high)
        usage(flag + ": expected a number in " + std::to_string(low) + ".." + std::to_string(high) +
              ", got " + text);
      return found;
    };
    if (flag == "--cases") {
      options.cases = static_cast<int>(number(1, 1000000));
    } else if (flag == "--seed") {
      options.seed = static_cast<uint64_t>(number(0, INT64_MAX));
    } else if (flag == "--hidden") {
      options.hidden_dim = static_cast<int>(number(1, 8192));
    } else if (flag == "--small") {
      options.small = true;
    } else if (flag == "--self-test") {
      options.self_test = true;
    } else if (flag == "--dtype") {
      const std::string name = value();
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
        if (name == name_of(dtype)) options.dtype = dtype;
      if (!options.dtype) usage("--dtype: expected fp32, bf16 or fp16, got " + name);
    } else {
      usage("unknown option " + flag);
    }
  }
  return options;
}

int run(const Options& options) {
  int devices = 0;
  if (!options.self_test && (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)) {
    printf("decode_check: no CUDA device\n");
    return kNoDevice;
  }
  int failed = 0;
  for (Case& c : options.cases > 0 ? random_cases(options) : fixed_cases(options.small)) {
    if (options.dtype) c.dtype = *options.dtype;
    if (options.hidden_dim > 0) c.hidden_dim = options.hidden_dim;
    std::string faults;
    double worst = 0;
    try {
      faults = run_case(c, options.self_test, &worst);
    } catch (const std::exception& error) {
      faults = std::string(error.what()) + "\n";
    }
    printf("%-40s %s seed %llu, batch %d, D %d, H %d, %d beams, k %d: ", c.name.c_str(),
           name_of(c.dtype), static_cast<unsigned long long>(c.seed), c.batch, c.dim, c.hidden_dim,
           c.num_beams, c.k);
    if (faults.empty()) {
      printf("ok, scores off by %.2f of what is allowed\n", worst);
    } else {
      printf("FAILED\n%s", faults.c_str());
      ++failed;
    }
    fflush(stdout);
  }
  printf(failed == 0 ? "ok\n" : "FAILED\n");
  return failed == 0 ? 0 : 1;
}

}  // namespace

}  // namespace sidmlp::native

int main(int argc, char** argv) { return sidmlp::native::run(sidmlp::native::parse(argc, argv)); }

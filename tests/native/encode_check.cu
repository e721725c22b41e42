// encode_check: the CUDA T5 encoder against an fp64 reference on seeded problems, without torch and
// Python, for compute-sanitizer and for debuggers.
//
//     encode_check            a fixed list of cases, every form of each
//       --small               without cases that take long under a sanitizer
//       --time                microseconds of graph replays at the published sizes instead
//       --time-long           the same of long requests
//       --case TEXT           only cases whose name has it
//       --form N              only the form of this number (encoder/sizes.h)
//       --batch N             only this batch is timed
//
// For each case and form: the relative error against the reference, at most twice that of the same
// mathematics with the roundings of half precision; the same bits for a request alone, elsewhere in
// the batch, with more padding, and from a workspace of NaNs; masked states are zeros, a request
// with an unknown id is NaN. Exit status 0: all hold, 1: some do not, 77: no CUDA device, 2: usage.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/sm90/encoder/encode_t5.h"
#include "native/device_arrays.h"
#include "native/encode_judge.h"
#include "native/encode_problem.h"
#include "native/encode_timing.h"

namespace sidmlp::native {

namespace {

constexpr int kNoDevice = 77;  // as automake's tests say "skipped"

std::vector<uint16_t> encode(const T5View& view, const Input& in, EncodeForm form, int garbage) {
  DeviceArrays device;
  EncodeT5Problem problem{};
  problem.model = view;
  problem.tokens = {device.copy_of(in.ids), device.copy_of(in.mask), in.batch(), in.tokens};
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

bool same_request(const std::vector<uint16_t>& a, int tokens_a, int at_a,
                  const std::vector<uint16_t>& b, int tokens_b, int at_b, int dim) {
  return memcmp(a.data() + static_cast<int64_t>(at_a) * tokens_a * dim,
                b.data() + static_cast<int64_t>(at_b) * tokens_b * dim,
                2 * static_cast<size_t>(std::min(tokens_a, tokens_b)) * dim) == 0;
}

int run_case(const Case& c, int only_form) {
  const Model model(c, 7 + c.tokens);
  DeviceArrays device;
  const T5View view = model.view(device);
  Input in = random_input(c, model.vocab, c.batch, 0, 11);
  if (c.bad_id) in.ids[0] = model.vocab, in.mask[0] = 1;
  const EncodeJudge judge(model, in);
  int faults = 0;
  for (const EncodeForm form : kForms) {
    if (only_form != 0 && static_cast<int>(form) != only_form) continue;
    if (!takes(view, form)) continue;
    const std::vector<uint16_t> got = encode(view, in, form, 0xff);
    Errors errors;
    std::string wrong = judge.faults(got, &errors);
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
    printf("%-34s form %2d  error %.5f  rounded reference %.5f  %s\n", c.name,
           static_cast<int>(form), errors.states, errors.rounded,
           wrong.empty() ? "ok" : wrong.c_str());
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
    Case& c = add("wgmma, requests of up to 128");
    c.heads = 3, c.ffn = 192, c.layers = 1, c.tokens = 108, c.batch = 4, c.mask = Case::kAny;
  }
  {
    Case& c = add("wgmma, unknown id, one head, fp16");
    c.dtype = DType::kFloat16, c.heads = 1, c.ffn = 64, c.layers = 2, c.tokens = 40;
    c.bad_id = true;
  }
  {
    Case& c = add("wgmma, requests of up to 192");
    c.heads = 2, c.ffn = 128, c.layers = 1, c.tokens = 150, c.batch = 4;
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
  {
    Case& c = add("long, three heads, tokens with gaps");
    c.dim = 256, c.heads = 3, c.ffn = 256, c.layers = 2, c.tokens = 330, c.mask = Case::kAny;
    c.reach = 40, c.batch = 4;
  }
  {
    Case& c = add("long, 128 wide, gelu, fp16");
    c.dtype = DType::kFloat16, c.heads = 3, c.ffn = 128, c.layers = 1, c.tokens = 470;
    c.activation = Activation::kGelu, c.reach = 20, c.batch = 4;
  }
  {
    Case& c = add("long, a bias that never ends, unknown id");
    c.dim = 256, c.heads = 2, c.ffn = 128, c.layers = 2, c.tokens = 200, c.bad_id = true;
  }
  if (small) return list;
  {
    Case& c = add("long, published layers, full");
    c.dim = 256, c.layers = 2, c.tokens = 998, c.mask = Case::kFull, c.batch = 2, c.reach = 128;
  }
  {
    Case& c = add("long, more than the workspace holds");
    c.dim = 256, c.heads = 2, c.layers = 1, c.ffn = 256, c.tokens = 600, c.batch = 90;
    c.reach = 128;
  }
  {
    Case& c = add("published, full, fp16");
    c.dtype = DType::kFloat16, c.mask = Case::kFull, c.batch = 2;
  }
  {
    Case& c = add("published, 700 requests");
    c.batch = 700, c.layers = 2;
  }
  {
    Case& c = add("eight heads, 8 layers, gelu, any mask");
    c.heads = 8, c.layers = 8, c.ffn = 448, c.activation = Activation::kGelu, c.tokens = 90;
    c.mask = Case::kAny, c.batch = 40;
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

}  // namespace

int main(int argc, char** argv) {
  bool small = false, time = false, time_of_long = false;
  std::string name;
  int form = 0, batch = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    if (option == "--small") {
      small = true;
    } else if (option == "--time") {
      time = true;
    } else if (option == "--time-long") {
      time_of_long = true;
    } else if (option == "--case" && i + 1 < argc) {
      name = argv[++i];
    } else if (option == "--form" && i + 1 < argc) {
      form = std::atoi(argv[++i]);
    } else if (option == "--batch" && i + 1 < argc) {
      batch = std::atoi(argv[++i]);
    } else {
      fprintf(stderr,
              "usage: encode_check [--small] [--time] [--time-long] [--case TEXT] [--form N] "
              "[--batch N]\n");
      return 2;
    }
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("encode_check: no CUDA device\n");
    return kNoDevice;
  }
  try {
    if (time) {
      time_all(form, batch);
      return 0;
    }
    if (time_of_long) {
      time_long(form, batch);
      return 0;
    }
    int faults = 0;
    for (const Case& c : cases(small))
      if (std::string(c.name).find(name) != std::string::npos) faults += run_case(c, form);
    printf(faults == 0 ? "all hold\n" : "%d do not hold\n", faults);
    return faults == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    fprintf(stderr, "encode_check: %s\n", error.what());
    return 1;
  }
}

}  // namespace sidmlp::native

int main(int argc, char** argv) { return sidmlp::native::main(argc, argv); }

// shape_answers: what a launch of the sm90 kernels would choose, for tests without a GPU. Built of
// csrc/cuda/sm90/shape.cpp alone, without CUDA's headers, by tests/test_cuda_choice.py.
//
// Reads lines "half dim hidden blocks beams levels codes.." and prints for each why the plain
// kernel decodes, or the cluster and group of each batch in `kBatches`, then those of the second of
// two launches where there are two. Fills a problem as
// csrc/torch does, and asks for both operators and several lengths of histories: exit status 1
// where these decide.
#include <cstdio>
#include <iostream>
#include <string>

#include "cuda/problem.h"
#include "cuda/sm90/shape.h"

namespace sidmlp::cuda {

namespace {

constexpr int64_t kBatches[] = {1, 16, 17, 32, 33, 64, 65, 264, 265, 4096, 100000};
constexpr int kTokens[] = {1, 82, 5000};

std::string answer(BeamDecodeProblem& problem) {
  if (const char* reason = sm90::why_not(problem)) return reason;
  std::string cuts;
  for (const int launches : {1, 2}) {
    if (launches == 2 && sm90::is_wide(problem)) break;
    for (const int64_t batch : kBatches) {
      problem.batch = batch;
      const sm90::Shape shape = sm90::shape_of(problem, launches);
      if (shape.shared_bytes + sm90::kFixed > kOneBlock) return "does not fit";
      cuts += std::to_string(shape.cluster) + "/" + std::to_string(shape.group) + " ";
    }
  }
  return cuts;
}

int run() {
  int half, dim, hidden, blocks, beams, levels;
  while (std::cin >> half >> dim >> hidden >> blocks >> beams >> levels) {
    BeamDecodeProblem problem{};
    problem.heads.dtype = half ? DType::kFloat16 : DType::kFloat32;
    problem.heads.num_levels = problem.trie.num_levels = levels;
    problem.heads.dim = problem.readout.dim = dim;
    problem.heads.hidden_dim = hidden;
    problem.heads.num_blocks = blocks;
    for (int l = 0; l < levels; ++l) std::cin >> problem.heads.heads[l].num_codes;
    problem.config.k = problem.config.num_beams = beams;
    problem.readout.dtype = problem.heads.dtype;
    problem.readout.num_heads = 8;
    problem.readout.head_dim = 128;
    problem.readout.ffn_dim = 4096;
    const float context = 0;
    problem.context = &context;
    const std::string found = answer(problem);
    problem.context = nullptr;
    for (const int tokens : kTokens) {
      problem.states.tokens = tokens;
      if (answer(problem) != found) {
        std::fprintf(stderr, "the operator or %d tokens decide\n", tokens);
        return 1;
      }
    }
    std::puts(found.c_str());
  }
  return 0;
}

}  // namespace
}  // namespace sidmlp::cuda

int main() { return sidmlp::cuda::run(); }

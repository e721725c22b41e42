#include "cuda/sm90/first_stage_shape.h"

#include <algorithm>

#include "cuda/problem.h"
#include "cuda/sm90/shape.h"

namespace sidmlp::cuda::sm90 {

namespace {

constexpr int kTwoBlocks = 113 * 1024;  // shared memory of which a multiprocessor holds two

constexpr bool power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

constexpr bool all_legal() {
  for (const FirstStageCut& cut : kFirstStageCuts)
    if (!power_of_two(cut.cluster) || !power_of_two(cut.group) || cut.cluster > 8 ||
        cut.group > kMaxFirstGroup)
      return false;
  return true;
}
static_assert(all_legal(), "clusters and groups are powers of two, at most 8 and kMaxFirstGroup");

FirstStageShape lay_out(const BeamDecodeProblem& problem, int cluster, int group) {
  const HeadsView& heads = problem.heads;
  FirstStageShape s{};
  while (1 << s.cluster_shift < cluster) ++s.cluster_shift;
  s.group = group;
  s.context_bytes = round_up(2 * heads.dim, 128) + 32;
  s.row_bytes = hidden_row_bytes(heads.hidden_dim);
  s.root_stride = round_up(heads.heads[0].num_codes, 4);
  const int tiles = (heads.heads[0].num_codes + 15) / 16;
  const int own_tiles = (tiles + cluster - 1) / cluster;

  int at = 0;
  auto take = [&](int64_t bytes) {
    const int from = at;
    at += round_up(bytes, 128);
    return from;
  };
  s.first = take(int64_t{4} * ((group + cluster - 1) / cluster) * heads.hidden_dim);
  s.contexts = take(int64_t{std::max(group, 8)} * s.context_bytes);
  s.readout = s.hidden = at;
  take(int64_t{group} * s.row_bytes);
  s.partial = take(int64_t{4} * own_tiles * 4 * 16 * group);
  s.bytes = at;
  if (problem.context == nullptr) {
    const Cut cut{INT_MAX, cluster, group, 2, ""};
    s.reads = readout_shape(sizes_of(problem.readout), problem.states.tokens, cut);
    s.bytes = std::max(s.bytes, s.readout + round_up(s.reads.bytes, 128));
  }
  return s;
}

}  // namespace

FirstStageShape first_stage_shape(const BeamDecodeProblem& problem) {
  const FirstStageCut* found = kFirstStageCuts;
  while (problem.batch > found->most_requests && found->most_requests < INT_MAX) ++found;
  FirstStageCut cut = *found;
  if (problem.context == nullptr) {
    const Cut& reads = cut_of_batch(problem.batch);
    cut = {reads.most_requests, reads.cluster, reads.group};
  }
  FirstStageShape shape = lay_out(problem, cut.cluster, cut.group);
  // One request always fits: it does in the one launch, which holds more.
  while (cut.group > 1 && shape.bytes + kFixed > kTwoBlocks) {
    cut.group /= 2;
    shape = lay_out(problem, cut.cluster, cut.group);
  }
  return shape;
}

int64_t num_blocks(const BeamDecodeProblem& problem, const FirstStageShape& shape) {
  return (problem.batch + shape.group - 1) / shape.group << shape.cluster_shift;
}

int64_t first_stage_bytes(const BeamDecodeProblem& problem, const FirstStageShape& shape) {
  const HeadsView& heads = problem.heads;
  const int64_t width = int64_t{heads.num_levels} * heads.hidden_dim;
  return 4 * problem.batch * (width + shape.root_stride);
}

const char* two_launches_why_not(const BeamDecodeProblem& problem) {
  if (const char* reason = why_not(problem)) return reason;
  if (is_wide(problem)) return "many beams or wide codebooks, which one launch decodes";
  // Contexts that are given need no readout, whose sizes are then all zero.
  const bool reads = problem.context == nullptr && problem.readout.dim > 0;
  if (reads && !reads_on_tensor_cores(sizes_of(problem.readout)))
    return "readout: expected sizes that its tensor core kernel takes";
  return nullptr;
}

}  // namespace sidmlp::cuda::sm90

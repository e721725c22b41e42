#include "cuda/sm90/shape.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

namespace {

constexpr int kTwoBlocks = 113 * 1024;  // shared memory of which a multiprocessor holds two
constexpr int kOneBlock = 227 * 1024;
constexpr int kFixed = 2048;  // static shared memory of the kernel, rounded up

constexpr Cut kCuts[] = {
    {16, 8, 1}, {32, 8, 2}, {64, 4, 2}, {264, 2, 2}, {INT32_MAX, 2, 4},
};

int round_up(int64_t n, int multiple) {
  return static_cast<int>((n + multiple - 1) / multiple * multiple);
}

int widest(const BeamDecodeProblem& problem) {
  int codes = 0;
  for (int l = 0; l < problem.heads.num_levels; ++l)
    codes = std::max(codes, problem.heads.heads[l].num_codes);
  return codes;
}

Cut cut_of(const BeamDecodeProblem& problem) {
  if (const char* text = std::getenv("SIDMLP_CUT"))
    return {0, std::atoi(text), std::atoi(std::strchr(text, ',') + 1)};
  for (const Cut& cut : kCuts)
    if (problem.batch <= cut.most_requests) return cut;
  return kCuts[0];
}

Shape lay_out(const BeamDecodeProblem& problem, const Cut& cut, int rows, int keys) {
  const HeadsView& heads = problem.heads;
  const int codes = widest(problem), levels = heads.num_levels, hidden = heads.hidden_dim;
  Shape s{};
  s.cluster = cut.cluster;
  s.group = cut.group;
  const int team = std::max(1, cut.cluster / cut.group);
  while (1 << s.cluster_shift < cut.cluster) ++s.cluster_shift;
  while (1 << s.team_shift < team) ++s.team_shift;
  s.users = std::max(1, cut.group / cut.cluster);
  s.rows = rows;
  s.row_bytes = round_up(2 * hidden, 128) + 16;  // eight rows lie in different banks
  s.context_bytes = round_up(2 * heads.dim, 128) + 32;
  s.logit_stride = round_up(codes, 32) + 8;  // as do four rows
  s.root_stride = round_up(heads.heads[0].num_codes, 4);
  s.key_capacity = keys;
  s.beams = round_up(problem.config.num_beams, 32);
  s.logits_over_hidden = codes <= 32 * (kThreads / 32);
  const int group_rows = cut.group <= 8 ? 8 : 16;
  const int tiles = (heads.heads[0].num_codes + 15) / 16;
  const int own_tiles = (tiles + cut.cluster - 1) / cut.cluster;

  int at = 0;
  auto take = [&](int64_t bytes) {
    const int from = at;
    at += round_up(bytes, 128);
    return from;
  };
  s.first = take(int64_t{4} * s.users * levels * hidden);
  s.contexts = take(int64_t{group_rows} * s.context_bytes);
  s.hidden = at;
  // One place for the group's hidden rows and sums, then for each level's rows and logits.
  s.partial = s.hidden + round_up(group_rows * s.row_bytes, 128);
  const int64_t group_bytes = s.partial - s.hidden + int64_t{4} * own_tiles * 4 * 16 * kMaxGroup;
  const int64_t row_bytes = round_up(int64_t{rows} * s.row_bytes, 128);
  const int64_t logit_bytes = int64_t{4} * rows * s.logit_stride;
  s.logits = s.hidden + (s.logits_over_hidden ? 0 : static_cast<int>(row_bytes));
  const int64_t level_bytes =
      s.logits_over_hidden ? std::max(row_bytes, logit_bytes) : row_bytes + logit_bytes;
  take(std::max(group_bytes, level_bytes));
  s.root_logits = take(int64_t{4} * s.users * s.root_stride);
  s.keys = take(int64_t{8} * keys * (team > 1 ? 2 : 1));
  s.beam_state = take(int64_t{2} * s.beams * 32);
  s.bins = take(4 * kBins);
  s.survivors = take(8 * kSurvivors);
  s.shared_bytes = at;
  if (problem.context == nullptr) {
    LayoutBuilder builder;
    s.readout.partial = builder.take<float>(partial_floats());
    s.readout.context = builder.take<float>(padded(heads.dim));
    s.readout.readout = readout_layout(problem.readout, problem.states.tokens, builder);
    s.readout.footprint = footprint_of(builder);
    s.shared_bytes = std::max(at, s.hidden + round_up(s.readout.footprint.shared, 128));
  }
  return s;
}

}  // namespace

const char* why_not(const BeamDecodeProblem& problem) {
  const HeadsView& heads = problem.heads;
  if (heads.dtype == DType::kFloat32) return "float32 weights take the plain kernel";
  if (heads.num_blocks != 1) return "further blocks of a head take the plain kernel";
  if (heads.hidden_dim % 32 != 0 || heads.hidden_dim > kMaxHidden)
    return "hidden_dim is no multiple of 32 up to 2048";
  if (heads.dim % 16 != 0 || heads.dim > 1024) return "dim is no multiple of 16 up to 1024";
  if (problem.config.num_beams > kMaxBeams) return "more than 128 beams";
  if (widest(problem) > 1024) return "more than 1024 codes";
  const Shape shape = shape_of(problem);
  if (shape.shared_bytes + kFixed > kOneBlock || shape.readout.footprint.workspace > 0)
    return "too wide for shared memory";
  return nullptr;
}

Shape shape_of(const BeamDecodeProblem& problem) {
  const Cut cut = cut_of(problem);
  const int team = std::max(1, cut.cluster / cut.group);
  const int most = (problem.config.num_beams + team - 1) / team;
  constexpr int kRows[] = {kMaxRows, 56, 32, 16}, kKeys[] = {4096, 3072, 2048};
  Shape shape{};
  for (const int budget : {kTwoBlocks, kOneBlock}) {
    for (int i = 0; i < 4; ++i) {
      if (i < 3 && kRows[i + 1] >= most) continue;  // fewer rows hold all of them
      for (const int keys : kKeys) {
        shape = lay_out(problem, cut, kRows[i], keys);
        if (shape.shared_bytes + kFixed <= budget) return shape;
      }
    }
  }
  return shape;
}

cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, cudaStream_t stream) {
  const int hidden = problem.heads.hidden_dim;
  const bool bf16 = problem.heads.dtype == DType::kBFloat16;
  const void* kernel = problem.context != nullptr
                           ? (bf16 ? beam_decode_bf16(hidden) : beam_decode_fp16(hidden))
                           : (bf16 ? decode_states_bf16(hidden) : decode_states_fp16(hidden));
  // Always the same number: another thread may launch the same kernel with more meanwhile.
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kOneBlock - kFixed);
  if (error != cudaSuccess) return error;
  const int64_t clusters = (problem.batch + shape.group - 1) / shape.group;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * shape.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {const_cast<BeamDecodeProblem*>(&problem), const_cast<Shape*>(&shape)};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace sidmlp::cuda::sm90

#include "cuda/sm90/shape.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "cuda/problem.h"

namespace sidmlp::cuda::sm90 {

namespace {

constexpr int kTwoBlocks = 113 * 1024;  // shared memory of which a multiprocessor holds two

int widest(const BeamDecodeProblem& problem) {
  int codes = 0;
  for (int l = 0; l < problem.heads.num_levels; ++l)
    codes = std::max(codes, problem.heads.heads[l].num_codes);
  return codes;
}

constexpr int kRows[] = {kMaxRows, 56, 32, 16};
constexpr int kKeys[] = {4096, 3072, 2048};
constexpr int kRootTiles = 16;  // of wide_beam.cuh: 32 KB of sums

constexpr bool power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

constexpr bool legal(const Cut& cut) {
  return power_of_two(cut.cluster) && power_of_two(cut.group) && cut.cluster <= 8 &&
         cut.group <= kMaxGroup;
}

constexpr bool takes_one(const Cut& cut) { return cut.group <= cut.cluster && cut.resident == 1; }

constexpr bool all_legal() {
  for (const Cut& cut : kCuts)
    if (!legal(cut)) return false;
  for (const Cut& cut : kLevelCuts)
    if (!legal(cut)) return false;
  for (const Cut& cut : kBeamCuts)
    if (!legal(cut) || !takes_one(cut)) return false;
  for (const Cut& cut : kCodeCuts)
    if (!legal(cut) || !takes_one(cut)) return false;
  return true;
}
static_assert(all_legal(), "clusters and groups are powers of two, at most 8; wide: one request");

int team_of(const Cut& cut) { return std::max(1, cut.cluster / cut.group); }

// What both kinds of kernel have alike.
Shape common(const BeamDecodeProblem& problem, const Cut& cut, int rows, int keys) {
  const HeadsView& heads = problem.heads;
  Shape s{};
  s.cluster = cut.cluster;
  s.group = cut.group;
  s.resident = cut.resident;
  while (1 << s.cluster_shift < cut.cluster) ++s.cluster_shift;
  while (1 << s.team_shift < team_of(cut)) ++s.team_shift;
  s.rows = rows;
  s.row_bytes = hidden_row_bytes(heads.hidden_dim);
  s.context_bytes = round_up(2 * heads.dim, 128) + 32;
  s.root_stride = round_up(heads.heads[0].num_codes, 4);
  s.key_capacity = keys;
  s.beams = round_up(problem.config.num_beams, 32);
  for (int l = 0; l < heads.num_levels; ++l)
    s.inverse_temperature[l] =
        std::min(1.0f / problem.config.temperature[l], std::numeric_limits<float>::max());
  return s;
}

Shape lay_out(const BeamDecodeProblem& problem, const Cut& cut, int rows, int keys, int launches) {
  const HeadsView& heads = problem.heads;
  const int codes = widest(problem), levels = heads.num_levels, hidden = heads.hidden_dim;
  const int team = team_of(cut);
  Shape s = common(problem, cut, rows, keys);
  s.users = std::max(1, cut.group / cut.cluster);
  s.logit_stride = round_up(codes, 32) + 8;  // four rows lie in different banks
  s.logits_over_hidden = codes <= 32 * (kThreads / 32);
  const int tiles = (heads.heads[0].num_codes + 15) / 16;
  const int own_tiles = (tiles + cut.cluster - 1) / cut.cluster;

  int at = 0;
  auto take = [&](int64_t bytes) {
    const int from = at;
    at += round_up(bytes, 128);
    return from;
  };
  s.first = take(int64_t{4} * s.users * levels * hidden);
  s.contexts = take(int64_t{kMaxGroup} * s.context_bytes);
  s.hidden = at;
  // One place for the group's hidden rows and sums, then for each level's rows and logits.
  s.partial = s.hidden + round_up(kMaxGroup * s.row_bytes, 128);
  const int64_t group_bytes =  // the second of two launches has the levels alone
      launches == 2 ? 0 : s.partial - s.hidden + int64_t{4} * own_tiles * 4 * 16 * kMaxGroup;
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
  s.shared_bytes = s.level_bytes = at;
  return s;
}

// Of wide_beam.cuh.
Shape lay_out_wide(const BeamDecodeProblem& problem, const Cut& cut, int rows, int keys) {
  const HeadsView& heads = problem.heads;
  const int beams = problem.config.num_beams, team = team_of(cut);
  Shape s = common(problem, cut, rows, keys);
  s.wide = true;
  s.users = 1;
  const int tiles = (heads.heads[0].num_codes + 15) / 16;
  s.root_tiles = std::min((tiles + cut.cluster - 1) / cut.cluster, kRootTiles);

  int at = 0;
  auto take = [&](int64_t bytes) {
    const int from = at;
    at += round_up(bytes, 128);
    return from;
  };
  s.first = take(int64_t{4} * heads.num_levels * heads.hidden_dim);
  s.contexts = take(int64_t{kMaxGroup} * s.context_bytes);
  s.hidden = s.survivors = at;
  // One place for the group's hidden rows and sums and the logits of level 1, then for each level's
  // rows and logits, and for the survivors of each cut.
  s.partial = s.hidden + round_up(cut.group * s.row_bytes, 128);
  s.root_logits = s.partial + 4 * s.root_tiles * 4 * 16 * kMaxGroup;
  s.logits = s.hidden + round_up(int64_t{rows} * s.row_bytes, 128);
  const int group_bytes = s.root_logits + 4 * s.root_stride - s.hidden;
  const int rows_bytes = s.logits + 4 * rows * kChunkStride - s.hidden;
  take(std::max({group_bytes, rows_bytes, 8 * kWideSurvivors}));
  s.staged_rows = (at - s.hidden) / s.row_bytes / (kThreads / 32);
  s.keys = take(int64_t{8} * keys);
  s.exchange = take(team > 1 ? int64_t{8} * team * beams : 0);
  s.beam_state = take(int64_t{2} * s.beams * 32);
  s.bins = take(4 * kBins);
  s.head_list = take(int64_t{4} * beams);
  s.first_key = take(int64_t{4} * (beams + 1));
  s.shared_bytes = s.level_bytes = at;
  return s;
}

// Adds what decode_states needs beside the levels.
Shape with_readout(const BeamDecodeProblem& problem, const Cut& cut, Shape s) {
  if (problem.context != nullptr) return s;
  const ReadoutSizes sizes = sizes_of(problem.readout);
  s.tensor_core_readout = reads_on_tensor_cores(sizes);
  if (s.tensor_core_readout) {
    s.readout = readout_shape(sizes, problem.states.tokens, cut);
    s.shared_bytes = std::max(s.level_bytes, s.hidden + round_up(s.readout.bytes, 128));
  } else {
    LayoutBuilder builder;
    s.plain_readout.partial = builder.take<float>(partial_floats());
    s.plain_readout.context = builder.take<float>(padded(problem.heads.dim));
    s.plain_readout.readout = readout_layout(problem.readout, problem.states.tokens, builder);
    s.plain_readout.footprint = footprint_of(builder);
    s.shared_bytes =
        std::max(s.level_bytes, s.hidden + round_up(s.plain_readout.footprint.shared, 128));
  }
  return s;
}

// The smallest form of a cut.
constexpr int kFewestRows = 8;

int fewest_keys(const BeamDecodeProblem& problem) {
  return round_up(problem.config.num_beams + widest(problem), 128);
}

// Whether the smallest form of the cut fits, beside the most that a readout keeps in shared memory:
// neither the operator nor the number of tokens may decide.
bool fits(const BeamDecodeProblem& problem, const Cut& cut, bool wide, int launches) {
  const Shape shape = wide ? lay_out_wide(problem, cut, kFewestRows, fewest_keys(problem))
                           : lay_out(problem, cut, kRows[3], kKeys[2], launches);
  const int readout = launches == 2 ? 0 : shape.hidden + static_cast<int>(kSharedBytes);
  return std::max(shape.level_bytes, readout) + kFixed <= kOneBlock;
}

// As many rows, then keys, as there is room for.
Shape wide_shape_of(const BeamDecodeProblem& problem, const Cut& cut) {
  const int team = team_of(cut), most = (problem.config.num_beams + team - 1) / team;
  const int fewest = fewest_keys(problem);
  constexpr int kOptions[] = {kMaxRows, 48, 32, 16, kFewestRows};
  for (const int rows : kOptions) {
    if (rows > kFewestRows && (rows == kMaxRows ? 48 : rows / 2) >= most) continue;
    for (const int keys : {8192, 4096, 0}) {
      const Shape shape =
          with_readout(problem, cut, lay_out_wide(problem, cut, rows, std::max(keys, fewest)));
      if (shape.shared_bytes + kFixed <= kOneBlock) return shape;
    }
  }
  return with_readout(problem, cut, lay_out_wide(problem, cut, kFewestRows, fewest));
}

}  // namespace

bool is_wide(const BeamDecodeProblem& problem) {
  if (problem.config.num_beams > kFewBeams || widest(problem) > kFewCodes) return true;
  return std::none_of(std::begin(kCuts), std::end(kCuts),
                      [&](const Cut& cut) { return fits(problem, cut, false, 1); });
}

Cuts cuts_of(const BeamDecodeProblem& problem, int launches) {
  if (launches == 2) return {std::begin(kLevelCuts), std::end(kLevelCuts)};
  if (!is_wide(problem)) return {std::begin(kCuts), std::end(kCuts)};
  if (widest(problem) <= kFewCodes) return {std::begin(kBeamCuts), std::end(kBeamCuts)};
  return {std::begin(kCodeCuts), std::end(kCodeCuts)};
}

const Cut* cut_of(const BeamDecodeProblem& problem, int launches) {
  const bool wide = launches == 1 && is_wide(problem);
  // Tensor cores that read out fit every one of kCuts, and some of the others.
  const ReadoutSizes sizes = sizes_of(problem.readout);
  const bool reads = wide && problem.context == nullptr && reads_on_tensor_cores(sizes);
  const Cut* found = nullptr;
  for (const Cut& cut : cuts_of(problem, launches)) {
    if (!fits(problem, cut, wide, launches) || (reads && !readout_fits(sizes, cut))) continue;
    found = &cut;
    if (problem.batch <= cut.most_requests) break;
  }
  return found;
}

const char* why_not(const BeamDecodeProblem& problem) {
  const HeadsView& heads = problem.heads;
  const DecodeSizes sizes{heads.dtype != DType::kFloat32,
                          heads.dim,
                          heads.hidden_dim,
                          heads.num_blocks,
                          widest(problem),
                          problem.config.num_beams};
  if (const char* reason = why_not(sizes)) return reason;
  return cut_of(problem) == nullptr ? "too wide for shared memory" : nullptr;
}

Shape shape_of(const BeamDecodeProblem& problem, int launches) {
  const Cut& cut = *cut_of(problem, launches);
  if (launches == 1 && is_wide(problem)) return wide_shape_of(problem, cut);
  auto whole = [&](int rows, int keys) {
    const Shape levels = lay_out(problem, cut, rows, keys, launches);
    return launches == 2 ? levels : with_readout(problem, cut, levels);
  };
  const int team = team_of(cut), most = (problem.config.num_beams + team - 1) / team;
  for (const int budget : {kTwoBlocks, kOneBlock}) {
    if (budget < kOneBlock && cut.resident == 1) continue;
    for (int i = 0; i < 4; ++i) {
      if (i < 3 && kRows[i + 1] >= most) continue;  // fewer rows hold all of them
      for (const int keys : kKeys) {
        const Shape shape = whole(kRows[i], keys);
        if (shape.shared_bytes + kFixed <= budget) return shape;
      }
    }
  }
  return whole(kRows[3], kKeys[2]);  // fits, since the cut does
}

int64_t num_blocks(const BeamDecodeProblem& problem, const Shape& shape) {
  return (problem.batch + shape.group - 1) / shape.group * shape.cluster;
}

const Cut& cut_of_batch(int64_t batch) {
  const Cut* cut = kCuts;
  while (batch > cut->most_requests && cut->most_requests < INT_MAX) ++cut;
  return *cut;
}

int64_t num_blocks(const ContextReadoutProblem& problem, const ReadoutShape& shape) {
  return (problem.batch + shape.group - 1) / shape.group << shape.cluster_shift;
}

}  // namespace sidmlp::cuda::sm90

// What a decode may and must return, from the CPU's logits, and whether it does.
//
// A near tie that falls the other way at an early level changes everything below it, so final cuts
// are not compared. Two sets of prefixes descend side by side, MUST within MAY. With s the score
// that the CPU's logits give a prefix, and every decode's score within eps_l of it after level l:
//
//   candidates are the children of MAY; those of a parent in MUST are certain
//   MAY drops c when num_beams certain candidates score above s(c) + 2 eps_l
//   MUST keeps a certain c when fewer than num_beams others score at least s(c) - 2 eps_l
//
// Leaves become items likewise. (As python/sidmlp/bounds.py does in float64.)
//
// A product that rounds its input to a dtype with unit roundoff u puts relative noise of u /
// sqrt(3) (uniform rounding) on each term, hence noise of u / sqrt(3) times the spread of the
// result; the products of one chain add up as squares, and so do a logit and the log-sum of its
// softmax, and so do levels, each with |weight| / temperature. Ten deviations are allowed, since
// hundreds of thousands of logits are compared and the spread of a row is not quite kLogitSpread
// (emulated with rounded inputs: the worst of half a million logits is off by 0.5 to 0.8 of what is
// allowed, contexts by 0.2 to 0.7, scores after four levels by 0.4):
//
//   logit error <= 10 sqrt(2 products) u / sqrt(3) kLogitSpread + 2^-20
//
// products: context, first layer's output and each further block's; with a readout eight more. The
// last term: float32 rounding of scores. u is 2^-9 for bfloat16 and 2^-12 for float16 (tensor cores
// take activations in the weights' dtype; a kernel that keeps float32 is well within), and for
// float32 2^-24 times the square root of the widest sum, which its order of summing may change.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "native/problem.h"

namespace sidmlp::native {

// Results of a batch, as ResultView has them.
struct Results {
  std::vector<int64_t> items;
  std::vector<float> scores;
  std::vector<int32_t> codes, counts;

  explicit Results(const Problem& p)
      : items(static_cast<int64_t>(p.sizes.batch) * p.sizes.k, 0x5a5a5a5a),
        scores(items.size(), 1e30f),
        codes(items.size() * p.num_levels(), 0x5a5a),
        counts(p.sizes.batch, 0x5a5a) {}
  ResultView view() { return {items.data(), scores.data(), codes.data(), counts.data()}; }
};

inline double activation_error(const Case& s, int products) {
  const double widest = std::max({s.dim, s.hidden_dim, s.ffn_dim, s.tokens});
  const double u = s.dtype == DType::kBFloat16  ? 0x1p-9
                   : s.dtype == DType::kFloat16 ? 0x1p-12
                                                : 0x1p-24 * std::sqrt(widest);
  return 10 * std::sqrt(2.0 * products) * u / std::sqrt(3.0);
}

// How far a logit may be off; contexts have a spread of 1 and eight products behind them.
inline double logit_tolerance(const Case& s) {
  const int products = 1 + s.num_blocks + (s.tokens > 0 ? 8 : 0);
  return kLogitSpread * activation_error(s, products) + 0x1p-20;
}
inline double context_tolerance(const Case& s) { return activation_error(s, 8) + 0x1p-20; }

// The CPU kernels of one instruction set on one problem, on the calling thread.
class CpuDecoder {
 public:
  CpuDecoder(const Problem& problem, const cpu::Kernels& kernels)
      : problem_(problem),
        kernels_(kernels),
        views_(views_of(problem, [](const Array& array) -> const void* {
          return array.bytes.empty() ? nullptr : array.bytes.data();
        })) {
    const Case& s = problem.sizes;
    contexts_.resize(static_cast<int64_t>(s.batch) * s.dim);
    if (!problem.from_states()) {
      std::copy_n(views_.context, contexts_.size(), contexts_.begin());
      return;
    }
    for (int begin = 0; begin < s.batch; begin += cpu::kMaxBlock) {
      arena_.reset(cpu::context_readout_bytes(views_.readout, s.tokens));
      kernels.context_readout(views_.readout, views_.states, begin,
                              std::min(begin + cpu::kMaxBlock, s.batch), context(begin), s.dim,
                              arena_);
    }
  }

  float* context(int request) {
    return contexts_.data() + static_cast<int64_t>(request) * problem_.sizes.dim;
  }
  const std::vector<float>& contexts() const { return contexts_; }

  Results decode() {
    const Case& s = problem_.sizes;
    Results results(problem_);
    for (int begin = 0; begin < s.batch; begin += cpu::kMaxBlock) {
      arena_.reset(cpu::beam_decode_bytes(views_.heads, views_.trie, problem_.config));
      kernels_.beam_decode(views_.heads, views_.trie, problem_.config, views_.exclude, begin,
                           std::min(begin + cpu::kMaxBlock, s.batch), context(begin), s.dim,
                           results.view(), arena_);
    }
    return results;
  }

  // Logits [C] of level index `level` for a context [D] after prefix codes [level].
  std::vector<float> logits(int level, const float* context, const int32_t* prefix) {
    arena_.reset(cpu::level_logits_bytes(views_.heads, level));
    std::vector<float> logits(problem_.sizes.codes[level]);
    kernels_.level_logits(views_.heads, level, 1, context, problem_.sizes.dim, prefix,
                          logits.data(), arena_);
    return logits;
  }

 private:
  const Problem& problem_;
  const cpu::Kernels& kernels_;
  Views views_;
  std::vector<float> contexts_;
  cpu::Arena arena_;
};

struct Candidate {
  double score;
  int32_t node;
  bool certain;  // its parent, or it itself, is among the beams of every decode
  std::vector<int32_t> codes;
};

// Scores of candidates, so that "how many are above x" is a search.
class Ranking {
 public:
  void add(double score, int64_t weight) { total_[score] += weight; }
  void close() {
    int64_t sum = 0;
    for (auto entry = total_.rbegin(); entry != total_.rend(); ++entry)
      entry->second = sum += entry->second;
  }
  int64_t above(double x) const { return of(total_.upper_bound(x)); }
  int64_t at_least(double x) const { return of(total_.lower_bound(x)); }

 private:
  int64_t of(std::map<double, int64_t>::const_iterator entry) const {
    return entry == total_.end() ? 0 : entry->second;
  }
  std::map<double, int64_t> total_;
};

class RequestJudge {
 public:
  RequestJudge(const Problem& problem, CpuDecoder& cpu, int request)
      : problem_(problem), cpu_(cpu), request_(request) {
    if (problem.finite(request)) descend();
  }

  // Faults of one request's result, one a line; "" for none. worst: the largest error of a score as
  // a share of what is allowed.
  std::string faults(const Results& results, double* worst) const {
    std::ostringstream out;
    const int k = problem_.sizes.k, levels = problem_.num_levels();
    const int64_t* items = results.items.data() + static_cast<int64_t>(request_) * k;
    const float* scores = results.scores.data() + static_cast<int64_t>(request_) * k;
    const int32_t* codes = results.codes.data() + static_cast<int64_t>(request_) * k * levels;
    const int count = results.counts[request_];
    if (count < 0 || count > k) {
      out << "count " << count << " is not in 0.." << k << "\n";
      return out.str();
    }
    std::set<int64_t> seen;
    for (int r = 0; r < count; ++r) {
      const auto found = emittable_.find(items[r]);
      const std::string at = "rank " + std::to_string(r) + ", item " + std::to_string(items[r]);
      if (found == emittable_.end()) {
        out << at << ": expected an item that may be returned\n";
        continue;
      }
      const Candidate& leaf = *found->second.leaf;
      const double error = std::abs(leaf.score - static_cast<double>(scores[r])) / eps_;
      if (!(error <= 1))
        out << at << ": expected score " << leaf.score << ", got " << scores[r] << "\n";
      *worst = std::max(*worst, error);
      if (!std::equal(leaf.codes.begin(), leaf.codes.end(), codes + r * levels))
        out << at << ": expected the codes of its leaf\n";
      if (!seen.insert(items[r]).second) out << at << ": returned twice\n";
      if (r > 0 && !(scores[r] <= scores[r - 1])) out << at << ": scores do not descend\n";
      // The items of a leaf stand together, in catalogue order, with one score.
      if (found->second.position > 0) {
        const auto before = r > 0 ? emittable_.find(items[r - 1]) : emittable_.end();
        if (before == emittable_.end() || before->second.leaf != &leaf ||
            before->second.position + 1 != found->second.position || scores[r] != scores[r - 1])
          out << at << ": expected after its leaf's item before it\n";
      }
    }
    for (const int64_t item : must_)
      if (seen.count(item) == 0) out << "item " << item << " must be returned, and is not\n";
    for (int r = count; r < k; ++r) {
      const bool empty =
          items[r] == -1 && scores[r] == -std::numeric_limits<float>::infinity() &&
          std::all_of(codes + r * levels, codes + (r + 1) * levels, [](int c) { return c == -1; });
      if (!empty) out << "rank " << r << ": expected -1, -inf and codes -1 past the count\n";
    }
    return out.str();
  }

 private:
  struct Emittable {
    const Candidate* leaf;
    int64_t position;  // among the leaf's items that are allowed
  };

  // Candidates of the level below `beams`, scored by the CPU's logits.
  std::vector<Candidate> expand(int level, const std::vector<Candidate>& beams) {
    const DecodeConfig& config = problem_.config;
    const Problem::Level& trie = problem_.levels[level];
    const bool over_all = config.codebook || level == 0;
    std::vector<Candidate> candidates;
    for (const Candidate& beam : beams) {
      const int32_t begin = trie.child_begin[beam.node], end = trie.child_begin[beam.node + 1];
      std::vector<float> logits;
      double log_total = 0;
      if (over_all || end - begin > 1) {
        logits = cpu_.logits(level, cpu_.context(request_), beam.codes.data());
        for (float& logit : logits) logit /= config.temperature[level];
        double total = 0;
        if (over_all)
          for (const float logit : logits) total += std::exp(static_cast<double>(logit));
        else
          for (int32_t n = begin; n < end; ++n)
            total += std::exp(static_cast<double>(logits[trie.codes[n]]));
        log_total = std::log(total);
      }
      for (int32_t n = begin; n < end; ++n) {
        Candidate child{beam.score, n, beam.certain, beam.codes};
        child.codes.push_back(trie.codes[n]);
        if (!logits.empty())
          child.score +=
              config.level_weight[level] * (static_cast<double>(logits[trie.codes[n]]) - log_total);
        candidates.push_back(std::move(child));
      }
    }
    return candidates;
  }

  std::vector<int64_t> allowed_items(int32_t leaf) const {
    std::vector<int64_t> ids;
    for (int32_t slot = problem_.leaf_begin[leaf]; slot < problem_.leaf_begin[leaf + 1]; ++slot)
      if (problem_.allowed(request_, slot)) ids.push_back(problem_.leaf_item_ids[slot]);
    return ids;
  }

  void descend() {
    const Case& s = problem_.sizes;
    const int levels = problem_.num_levels();
    std::vector<Candidate> beams = {{0.0, 0, true, {}}};
    double noise = 0;
    for (int level = 0; level < levels; ++level) {
      const DecodeConfig& config = problem_.config;
      const double slope = std::abs(config.level_weight[level]) / config.temperature[level];
      noise += slope * slope * logit_tolerance(s) * logit_tolerance(s);
      eps_ = std::sqrt(noise) + (level + 1) * 0x1p-20;
      std::vector<Candidate> candidates = expand(level, beams);
      const bool last = level + 1 == levels;
      Ranking certain, all, certain_items;
      std::vector<int64_t> sizes;
      for (const Candidate& c : candidates) {
        sizes.push_back(last ? static_cast<int64_t>(allowed_items(c.node).size()) : 1);
        if (sizes.back() == 0) continue;
        all.add(c.score, 1);
        if (c.certain) certain.add(c.score, 1);
        if (c.certain) certain_items.add(c.score, sizes.back());
      }
      for (Ranking* ranking : {&certain, &all, &certain_items}) ranking->close();
      beams.clear();
      for (size_t i = 0; i < candidates.size(); ++i) {
        Candidate& c = candidates[i];
        if (sizes[i] == 0 || certain.above(c.score + 2 * eps_) >= s.num_beams) continue;
        c.certain = c.certain && all.at_least(c.score - 2 * eps_) - 1 < s.num_beams;
        beams.push_back(std::move(c));
      }
      if (last) emit(std::move(beams), certain_items);
    }
  }

  void emit(std::vector<Candidate> leaves, const Ranking& certain_items) {
    leaves_ = std::move(leaves);
    Ranking all;
    for (const Candidate& leaf : leaves_)
      all.add(leaf.score, static_cast<int64_t>(allowed_items(leaf.node).size()));
    all.close();
    for (const Candidate& leaf : leaves_) {
      const std::vector<int64_t> ids = allowed_items(leaf.node);
      const auto size = static_cast<int64_t>(ids.size());
      for (int64_t p = 0; p < size; ++p) {
        if (p + certain_items.above(leaf.score + 2 * eps_) < problem_.sizes.k)
          emittable_[ids[p]] = {&leaf, p};
        if (leaf.certain && p + all.at_least(leaf.score - 2 * eps_) - size < problem_.sizes.k)
          must_.push_back(ids[p]);
      }
    }
  }

  const Problem& problem_;
  CpuDecoder& cpu_;
  int request_;
  double eps_ = 0;  // after the last level
  std::vector<Candidate> leaves_;
  std::map<int64_t, Emittable> emittable_;  // what may be returned
  std::vector<int64_t> must_;
};

}  // namespace sidmlp::native

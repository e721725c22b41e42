#include "cpu/token_rows.h"

#include <algorithm>

namespace sidmlp::cpu {

std::vector<int64_t> count_tokens(const TokensView& in, int64_t vocab_size) {
  std::vector<int64_t> counts(in.batch);
  for (int64_t b = 0; b < in.batch; ++b) {
    const int64_t* ids = in.ids + b * in.tokens;
    const uint8_t* mask = in.mask + b * in.tokens;
    int64_t count = 0;
    bool known = true;
    for (int t = 0; t < in.tokens; ++t) {
      if (!mask[t]) continue;
      ++count;
      known = known && ids[t] >= 0 && ids[t] < vocab_size;
    }
    counts[b] = known ? count : -1;
  }
  return counts;
}

std::vector<int64_t> cut_blocks(const std::vector<int64_t>& counts, int64_t rows) {
  std::vector<int64_t> blocks{0};
  int64_t in_block = 0;
  for (size_t b = 0; b < counts.size(); ++b) {
    const int64_t count = std::max<int64_t>(counts[b], 0);
    // What is nearer to `rows`: with this request or without it.
    if (in_block > 0 && 2 * in_block + count > 2 * rows) {
      blocks.push_back(static_cast<int64_t>(b));
      in_block = 0;
    }
    in_block += count;
  }
  blocks.push_back(static_cast<int64_t>(counts.size()));
  return blocks;
}

RowTable::RowTable(const TokensView& in, const std::vector<int64_t>& counts, int64_t begin,
                   int64_t end, int num_roles)
    : tokens_(in.tokens) {
  int64_t total = 0;
  for (int64_t b = begin; b < end; ++b) total += std::max<int64_t>(counts[b], 0);
  request_.reserve(total), position_.reserve(total), role_.reserve(total);
  id_.reserve(total), source_.reserve(total);
  for (int64_t b = begin; b < end; ++b) {
    if (counts[b] <= 0) continue;
    const int64_t first = static_cast<int64_t>(id_.size());
    for (int t = 0; t < in.tokens; ++t) {
      const int64_t at = b * in.tokens + t;
      if (!in.mask[at]) continue;
      request_.push_back(static_cast<int32_t>(requests_.size()));
      position_.push_back(t);
      role_.push_back(num_roles == 0 ? 0 : (t + num_roles - 1) % num_roles);
      id_.push_back(in.ids[at]);
      source_.push_back(at);
    }
    if (num_roles > 0) role_.back() = num_roles - 1;
    requests_.push_back({first, first + counts[b], padded_count_});
    padded_count_ += padded(counts[b]);
    longest_ = std::max(longest_, counts[b]);
  }
}

TokenRows RowTable::view() const {
  TokenRows rows{};
  rows.tokens = tokens_;
  rows.count = static_cast<int64_t>(id_.size());
  rows.padded_count = padded_count_;
  rows.longest = longest_;
  rows.num_requests = static_cast<int64_t>(requests_.size());
  rows.requests = requests_.data();
  rows.request = request_.data();
  rows.position = position_.data();
  rows.role = role_.data();
  rows.id = id_.data();
  rows.source = source_.data();
  return rows;
}

}  // namespace sidmlp::cpu

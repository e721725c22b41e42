// Token ids and mask -> the rows of valid tokens that encoders compute. Ids of masked tokens are
// never read.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/encoders.h"

namespace sidmlp::cpu {

// Valid tokens of each request; -1 where one of them is not in the vocabulary: such a request is
// not computed.
std::vector<int64_t> count_tokens(const TokensView&, int64_t vocab_size);

// Requests in blocks [block[i], block[i + 1]) of about `rows` rows, at least one request each.
std::vector<int64_t> cut_blocks(const std::vector<int64_t>& counts, int64_t rows);

// The rows of requests [begin, end). `num_roles` > 0: a token's role is (position - 1) mod
// num_roles, but the first position's and the last valid token's is num_roles - 1.
class RowTable {
 public:
  RowTable(const TokensView&, const std::vector<int64_t>& counts, int64_t begin, int64_t end,
           int num_roles);
  TokenRows view() const;

 private:
  int tokens_;
  int64_t padded_count_ = 0, longest_ = 0;
  std::vector<RequestRows> requests_;
  std::vector<int32_t> request_, position_, role_;
  std::vector<int64_t> id_, source_;
};

}  // namespace sidmlp::cpu

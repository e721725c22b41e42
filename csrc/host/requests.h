// Requests as an encoder takes them: item ids -> positions among the known items -> token ids and
// mask, in one pass over the items.
//
//   row of ids   user token, codes of each item in order, eos, pad ..
//   row of mask  1 for each of these tokens, 0 for padding
//
// Nothing here knows Python, torch or a GPU.

#pragma once

#include <cstdint>

#include "sidmlp/views.h"  // kMaxLevels

namespace sidmlp {

// Items that a history may contain. An id's position is table[id]; without a table order[i] where
// sorted_ids[i] is the id; without both the id itself.
struct KnownView {
  const int32_t* table;       // [table_size], -1 = unknown; or null
  const int64_t* sorted_ids;  // [num_items] ascending; or null
  const int32_t* order;       // [num_items], beside sorted_ids
  const int16_t* codes;       // [num_items, num_levels], row-major
  int64_t table_size;
  int64_t num_items;
  int num_levels;
};

// What a request is made of.
struct TokenLayout {
  int64_t code_offsets[kMaxLevels];  // token of a code at each level = offset + code
  int64_t user_offset;               // the token of a user without one of its own
  int64_t eos_id;
  int64_t pad_id;
  int64_t max_items;  // the newest of a longer history count
};

struct HistoriesView {
  const int64_t* items;        // of all requests in order, oldest first
  const int64_t* lengths;      // [batch], how many of them are each request's
  const int64_t* user_tokens;  // [batch]; null: user_offset for all
  int64_t batch;
};

// Fills ids and mask [batch, tokens], row-major, and returns -1; tokens >= 2 + L * min(length,
// max_items) of every request. Returns the first request with an unknown item instead, with the
// rows before it filled, if there is one.
int64_t place_requests(const HistoriesView& histories, const KnownView& known,
                       const TokenLayout& layout, int64_t tokens, int64_t* ids, uint8_t* mask);

}  // namespace sidmlp

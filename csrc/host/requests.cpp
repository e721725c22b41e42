#include "requests.h"

#include <algorithm>
#include <cstring>

namespace sidmlp {
namespace {

// Searches that are under way together: their loads overlap, where one search after the other would
// wait for each of its log2(num_items) loads in turn.
constexpr int64_t kTogether = 16;

// Positions of up to kTogether ids, -1 for unknown ones.
void search(const KnownView& known, const int64_t* ids, int64_t count, int64_t* positions) {
  int64_t at[kTogether] = {};
  for (int64_t left = known.num_items; left > 1;) {
    const int64_t half = left / 2;
    for (int64_t i = 0; i < count; ++i)
      at[i] += known.sorted_ids[at[i] + half - 1] < ids[i] ? half : 0;
    left -= half;
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool found = known.num_items > 0 && known.sorted_ids[at[i]] == ids[i];
    positions[i] = found ? known.order[at[i]] : -1;
  }
}

void positions_of(const KnownView& known, const int64_t* ids, int64_t count, int64_t* positions) {
  if (known.sorted_ids != nullptr) return search(known, ids, count, positions);
  const int64_t size = known.table != nullptr ? known.table_size : known.num_items;
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = ids[i] >= 0 && ids[i] < size;
    positions[i] = !inside ? -1 : known.table != nullptr ? known.table[ids[i]] : ids[i];
  }
}

}  // namespace

int64_t place_requests(const HistoriesView& histories, const KnownView& known,
                       const TokenLayout& layout, int64_t tokens, int64_t* ids, uint8_t* mask) {
  const int64_t* items = histories.items;
  for (int64_t request = 0; request < histories.batch; ++request) {
    const int64_t length = histories.lengths[request];
    const int64_t first = std::max<int64_t>(length - layout.max_items, 0);  // that counts
    int64_t* row = ids + request * tokens;
    int64_t* token = row;
    *token++ =
        histories.user_tokens != nullptr ? histories.user_tokens[request] : layout.user_offset;
    for (int64_t begin = 0; begin < length; begin += kTogether) {
      int64_t positions[kTogether];
      const int64_t count = std::min(kTogether, length - begin);
      positions_of(known, items + begin, count, positions);
      for (int64_t i = 0; i < count; ++i) {
        if (positions[i] < 0) return request;
        if (begin + i < first) continue;
        const int16_t* codes = known.codes + positions[i] * known.num_levels;
        for (int level = 0; level < known.num_levels; ++level)
          *token++ = layout.code_offsets[level] + codes[level];
      }
    }
    *token++ = layout.eos_id;
    const int64_t valid = token - row;
    std::fill(token, row + tokens, layout.pad_id);
    std::memset(mask + request * tokens, 1, static_cast<size_t>(valid));
    std::memset(mask + request * tokens + valid, 0, static_cast<size_t>(tokens - valid));
    items += length;
  }
  return -1;
}

}  // namespace sidmlp

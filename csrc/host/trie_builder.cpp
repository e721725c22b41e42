// Stages of build_trie, each over equal parts of the items, one part per thread:
//   1. check_codes     every code lies in 0..C_l-1 (the histograms below index by code)
//   2. sort_by_level   L..1: stable counting sort of the item order by one code (LSD radix sort)
//   3. change_levels   for each sorted item, the first level where it differs from the one before
//   4. fill            a new node at that level and at every deeper one
// What bounds it is the random gather of codes through the item order, L + 2 times.

#include "trie_builder.h"

#include <algorithm>
#include <string>
#include <thread>

namespace sidmlp {
namespace {

// Below this a second thread costs more than it saves.
constexpr int64_t kItemsPerThread = 1 << 16;
// More threads only wait for memory, and each one brings a histogram.
constexpr int kMaxThreads = 8;

// Calls work(part, begin, end) for every part of 0..n-1; the parts are in order and disjoint.
// `work` must not throw.
template <class Work>
void for_parts(int64_t n, int parts, const Work& work) {
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(parts));  // emplace_back below then only fails to start
  const auto begin_of = [&](int part) { return n * part / parts; };
  struct Joiner {
    std::vector<std::thread>& pool;
    ~Joiner() {
      for (std::thread& thread : pool) thread.join();
    }
  } joiner{pool};
  for (int part = 1; part < parts; ++part) {
    pool.emplace_back([&work, part, begin = begin_of(part), end = begin_of(part + 1)] {
      work(part, begin, end);
    });
  }
  work(0, begin_of(0), begin_of(1));
}

template <class Code>
void check_sizes(const CatalogueView<Code>& catalogue) {
  if (catalogue.num_levels < 1 || catalogue.num_levels > kMaxLevels) {
    throw InputError("codes has " + std::to_string(catalogue.num_levels) + " levels; expected 1.." +
                     std::to_string(kMaxLevels) + " (codes is [items, levels])");
  }
  if (catalogue.num_items < 1) {
    throw InputError("the catalogue is empty: expected at least 1 item, got 0");
  }
  if (catalogue.num_items > kMaxItems) {
    throw InputError("the catalogue has " + std::to_string(catalogue.num_items) +
                     " items; expected at most " + std::to_string(kMaxItems) +
                     ": split it over several catalogues");
  }
  for (int l = 0; l < catalogue.num_levels; ++l) {
    if (catalogue.level_size[l] < 1 || catalogue.level_size[l] > kMaxCodesPerLevel) {
      throw InputError("codes_per_level of level " + std::to_string(l + 1) + " is " +
                       std::to_string(catalogue.level_size[l]) + "; expected 1.." +
                       std::to_string(kMaxCodesPerLevel));
    }
  }
}

template <class Code>
void check_codes(const CatalogueView<Code>& catalogue, int threads) {
  const int levels = catalogue.num_levels;
  std::vector<int64_t> first_bad(static_cast<size_t>(threads), -1);  // flat index into codes
  for_parts(catalogue.num_items, threads, [&](int part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Code* row = catalogue.codes + i * levels;
      for (int l = 0; l < levels; ++l) {
        if (row[l] < 0 || row[l] >= catalogue.level_size[l]) {
          first_bad[static_cast<size_t>(part)] = i * levels + l;
          return;
        }
      }
    }
  });
  for (const int64_t at : first_bad) {
    if (at < 0) continue;
    const int64_t item = at / levels, level = at % levels;
    throw InputError("the code of item " + std::to_string(catalogue.item_ids[item]) +
                     " (position " + std::to_string(item) + ") at level " +
                     std::to_string(level + 1) + " is out of range: expected 0.." +
                     std::to_string(catalogue.level_size[level] - 1) + ", got " +
                     std::to_string(catalogue.codes[at]) +
                     "; correct the code or raise codes_per_level");
  }
}

// Stable sort of `order` by the code at level l. `next` and `keys` are scratch of N elements; the
// result is in `order`.
template <class Code>
void sort_by_level(const CatalogueView<Code>& catalogue, int l, int threads, Buffer<int32_t>& order,
                   Buffer<int32_t>& next, Buffer<int16_t>& keys) {
  const int64_t size = catalogue.level_size[l];
  const int levels = catalogue.num_levels;
  std::vector<std::vector<int32_t>> slot(static_cast<size_t>(threads),
                                         std::vector<int32_t>(static_cast<size_t>(size), 0));

  for_parts(catalogue.num_items, threads, [&](int part, int64_t begin, int64_t end) {
    int32_t* count = slot[static_cast<size_t>(part)].data();
    for (int64_t i = begin; i < end; ++i) {
      const auto code = static_cast<int16_t>(catalogue.codes[int64_t{order[i]} * levels + l]);
      keys[i] = code;  // kept, so that the scatter below reads in sequence
      ++count[code];
    }
  });

  // Code first, part second: equal codes keep the order of their parts, so the sort is stable.
  int32_t start = 0;
  for (int64_t code = 0; code < size; ++code) {
    for (std::vector<int32_t>& of_part : slot) {
      const int32_t count = of_part[static_cast<size_t>(code)];
      of_part[static_cast<size_t>(code)] = start;
      start += count;
    }
  }

  for_parts(catalogue.num_items, threads, [&](int part, int64_t begin, int64_t end) {
    int32_t* to = slot[static_cast<size_t>(part)].data();
    for (int64_t i = begin; i < end; ++i) next[to[keys[i]]++] = order[i];
  });
  std::swap(order.data, next.data);
}

template <class Code>
Buffer<int32_t> sorted_order(const CatalogueView<Code>& catalogue, int threads) {
  Buffer<int32_t> order(catalogue.num_items), next(catalogue.num_items);
  Buffer<int16_t> keys(catalogue.num_items);
  for_parts(catalogue.num_items, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) order[i] = static_cast<int32_t>(i);
  });
  for (int l = catalogue.num_levels - 1; l >= 0; --l) {
    sort_by_level(catalogue, l, threads, order, next, keys);
  }
  return order;
}

// Nodes of each level that begin in a part of the sorted items.
using NodeCounts = std::vector<int32_t>;  // [L]

// change[i]: the first level (0-based) at which sorted item i differs from sorted item i-1; L when
// it does not. Returns the node counts of each part.
template <class Code>
std::vector<NodeCounts> change_levels(const CatalogueView<Code>& catalogue,
                                      const Buffer<int32_t>& order, int threads,
                                      Buffer<uint8_t>& change) {
  const int levels = catalogue.num_levels;
  std::vector<NodeCounts> counts(static_cast<size_t>(threads),
                                 NodeCounts(static_cast<size_t>(levels), 0));
  for_parts(catalogue.num_items, threads, [&](int part, int64_t begin, int64_t end) {
    int32_t at_level[kMaxLevels + 1] = {};
    for (int64_t i = begin; i < end; ++i) {
      int l = 0;
      if (i > 0) {
        const Code* row = catalogue.codes + int64_t{order[i]} * levels;
        const Code* before = catalogue.codes + int64_t{order[i - 1]} * levels;
        while (l < levels && row[l] == before[l]) ++l;
      }
      change[i] = static_cast<uint8_t>(l);
      ++at_level[l];
    }
    int32_t nodes = 0;  // a change at one level starts a node there and at every deeper level
    for (int l = 0; l < levels; ++l) {
      nodes += at_level[l];
      counts[static_cast<size_t>(part)][static_cast<size_t>(l)] = nodes;
    }
  });
  return counts;
}

Trie allocate(const NodeCounts& nodes, int64_t num_items) {
  Trie trie;
  int64_t parents = 1;
  for (const int32_t n : nodes) {
    TrieLevel level;
    level.child_begin = Buffer<int32_t>(parents + 1);
    level.codes = Buffer<int16_t>(n);
    level.child_begin[0] = 0;
    level.child_begin[parents] = n;
    trie.levels.push_back(std::move(level));
    parents = n;
  }
  trie.leaf_begin = Buffer<int32_t>(parents + 1);
  trie.leaf_begin[parents] = static_cast<int32_t>(num_items);
  trie.leaf_item_ids = Buffer<int64_t>(num_items);
  trie.leaf_available = Buffer<uint8_t>(num_items);
  return trie;
}

template <class Code>
void fill(const CatalogueView<Code>& catalogue, const Buffer<int32_t>& order,
          const Buffer<uint8_t>& change, const std::vector<NodeCounts>& first_node, int threads,
          Trie& trie) {
  const int levels = catalogue.num_levels;
  for_parts(catalogue.num_items, threads, [&](int part, int64_t begin, int64_t end) {
    int32_t next_node[kMaxLevels] = {};
    std::copy_n(first_node[static_cast<size_t>(part)].begin(), levels, next_node);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t item = order[i];
      const Code* row = catalogue.codes + item * levels;
      for (int l = change[i]; l < levels; ++l) {
        const int32_t node = next_node[l]++;
        trie.levels[static_cast<size_t>(l)].codes[node] = static_cast<int16_t>(row[l]);
        if (l + 1 < levels) {
          trie.levels[static_cast<size_t>(l) + 1].child_begin[node] = next_node[l + 1];
        } else {
          trie.leaf_begin[node] = static_cast<int32_t>(i);
        }
      }
      trie.leaf_item_ids[i] = catalogue.item_ids[item];
      trie.leaf_available[i] = catalogue.available == nullptr || catalogue.available[item] != 0;
    }
  });
}

}  // namespace

int default_threads(int64_t num_items) {
  const auto processors = static_cast<int>(std::thread::hardware_concurrency());
  const auto useful = static_cast<int>(std::min<int64_t>(num_items / kItemsPerThread, kMaxThreads));
  return std::max(1, std::min(processors, useful));
}

template <class Code>
Trie build_trie(const CatalogueView<Code>& catalogue, int threads) {
  check_sizes(catalogue);
  check_codes(catalogue, threads);
  Buffer<int32_t> order = sorted_order(catalogue, threads);

  Buffer<uint8_t> change(catalogue.num_items);
  std::vector<NodeCounts> counts = change_levels(catalogue, order, threads, change);
  NodeCounts total(static_cast<size_t>(catalogue.num_levels), 0);
  for (NodeCounts& of_part : counts) {  // counts become each part's first node
    for (size_t l = 0; l < total.size(); ++l) {
      const int32_t nodes = of_part[l];
      of_part[l] = total[l];
      total[l] += nodes;
    }
  }

  Trie trie = allocate(total, catalogue.num_items);
  fill(catalogue, order, change, counts, threads, trie);
  trie.leaf_order = std::move(order);
  return trie;
}

template Trie build_trie<int16_t>(const CatalogueView<int16_t>&, int);
template Trie build_trie<int32_t>(const CatalogueView<int32_t>&, int);

}  // namespace sidmlp

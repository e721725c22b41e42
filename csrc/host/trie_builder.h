// Catalogue trie: item codes -> one CSR level per code position, then leaf -> items.
//
// Items are sorted by their code tuples (stable, so that items which share a tuple keep their
// catalogue order); a node of level l is a maximal run of items that agree in their first l codes.
// Nothing here knows Python, torch or a GPU.

#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <vector>

#include "sidmlp/views.h"  // kMaxLevels

namespace sidmlp {

inline constexpr int64_t kMaxCodesPerLevel = INT16_MAX;  // codes are stored as int16
inline constexpr int64_t kMaxItems = INT32_MAX;          // nodes and items are counted in int32

// What the caller got wrong; the text says what, expected, got and the remedy.
class InputError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// An array whose elements are not touched before they are first written.
template <class T>
struct Buffer {
  Buffer() = default;
  explicit Buffer(int64_t n) : data(new T[static_cast<size_t>(n)]), size(n) {}

  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  const T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }

  std::unique_ptr<T[]> data;
  int64_t size = 0;
};

// Code is int16_t or int32_t. The arrays must not change while a trie is built from them.
template <class Code>
struct CatalogueView {
  const Code* codes;          // [num_items, num_levels], row-major
  const int64_t* item_ids;    // [num_items]
  const uint8_t* available;   // [num_items], 0 = not to be recommended; null: all are available
  const int64_t* level_size;  // [num_levels], C_l
  int64_t num_items;
  int num_levels;
};

struct TrieLevel {
  Buffer<int32_t> child_begin;  // [n_{l-1} + 1]; the children of node p of level l-1 are the
                                // nodes child_begin[p] .. child_begin[p+1]-1 of this level
  Buffer<int16_t> codes;        // [n_l], ascending among siblings
};

struct Trie {
  std::vector<TrieLevel> levels;   // [L]
  Buffer<int32_t> leaf_begin;      // [n_L + 1]; the items of leaf n are leaf_begin[n] ..
  Buffer<int64_t> leaf_item_ids;   // [N] in leaf order, catalogue order inside a leaf
  Buffer<uint8_t> leaf_available;  // [N] in leaf order, 0 or 1
  Buffer<int32_t> leaf_order;      // [N], catalogue position of each leaf slot
};

// Threads that pay for this many items on this machine.
int default_threads(int64_t num_items);

// Linear in N * L time; N * 11 bytes of scratch beside the result. Throws InputError.
template <class Code>
Trie build_trie(const CatalogueView<Code>& catalogue, int threads);

extern template Trie build_trie<int16_t>(const CatalogueView<int16_t>&, int);
extern template Trie build_trie<int32_t>(const CatalogueView<int32_t>&, int);

}  // namespace sidmlp

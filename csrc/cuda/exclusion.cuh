// The item ids that one request must not be given, ascending.
#pragma once

#include "sidmlp/views.h"

namespace sidmlp::cuda {

struct Exclusion {
  const int64_t* begin;
  const int64_t* end;

  __device__ __forceinline__ bool holds(int64_t item) const {
    const int64_t *low = begin, *high = end;
    while (low < high) {
      const int64_t* middle = low + (high - low) / 2;
      if (*middle < item) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < end && *low == item;
  }
};

// Offsets are device data that nobody has checked, so they are clamped to the `total` ids.
__device__ __forceinline__ Exclusion exclusion_of(const ExcludeView& view, int64_t total,
                                                  int64_t request) {
  if (view.ids == nullptr) return {nullptr, nullptr};
  const int64_t from = min(max(view.offsets[request], int64_t{0}), total);
  return {view.ids + from, view.ids + min(max(view.offsets[request + 1], from), total)};
}

}  // namespace sidmlp::cuda

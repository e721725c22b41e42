// Exact streaming top-n of beam keys. Keeps up to 2n candidates and cuts back to the n best when
// full, so the cost of a candidate is one compare once the buffer has seen n good ones.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sidmlp/beam_key.h"

namespace sidmlp::cpu {

class BeamSelector {
 public:
  // `buffer` has room for selector_capacity(num_beams) keys.
  BeamSelector(BeamKey* buffer, int num_beams);

  // Every key at or below this one is known to be outside the top n (kNoKey until n candidates were
  // seen).
  BeamKey threshold() const { return threshold_; }
  __attribute__((always_inline)) void push(BeamKey key) {
    if (key <= threshold_) return;
    buffer_[count_++] = key;
    if (count_ == capacity_) cut();
  }
  // Sorts the n best, best first, and returns how many there are. They lie at keys().
  int finish();
  const BeamKey* keys() const { return buffer_; }
  void clear();

 private:
  void
  cut();  // out of line, in a file without instruction-set flags: see linear_algebra.inl on why

  BeamKey* buffer_;
  size_t num_beams_;
  size_t capacity_;
  size_t count_ = 0;
  BeamKey threshold_ = kNoKey;
};

constexpr size_t selector_capacity(int num_beams) {
  return static_cast<size_t>(num_beams) + (num_beams < 64 ? 64 : num_beams);
}

}  // namespace sidmlp::cpu

#include "cpu/selection.h"

#include <algorithm>
#include <functional>

namespace sidmlp::cpu {

BeamSelector::BeamSelector(BeamKey* buffer, int num_beams)
    : buffer_(buffer), num_beams_(num_beams), capacity_(selector_capacity(num_beams)) {}

void BeamSelector::clear() {
  count_ = 0;
  threshold_ = kNoKey;
}

void BeamSelector::cut() {
  BeamKey* worst_kept = buffer_ + (num_beams_ - 1);
  std::nth_element(buffer_, worst_kept, buffer_ + count_, std::greater<BeamKey>());
  threshold_ = *worst_kept;
  count_ = num_beams_;
}

int BeamSelector::finish() {
  if (count_ > num_beams_) cut();
  std::sort(buffer_, buffer_ + count_, std::greater<BeamKey>());
  return static_cast<int>(count_);
}

}  // namespace sidmlp::cpu

#include "cpu/arena.h"

#include <cstdlib>
#include <new>

namespace sidmlp::cpu {

Arena::~Arena() { std::free(base_); }

void Arena::reset(size_t bytes) {
  used_ = 0;
  if (bytes <= capacity_) return;
  std::free(base_);
  capacity_ = 0;
  base_ = static_cast<char*>(std::aligned_alloc(64, arena_bytes(bytes)));
  if (base_ == nullptr) throw std::bad_alloc();
  capacity_ = arena_bytes(bytes);
}

void* Arena::take(size_t bytes) {
  const size_t start = used_;
  used_ += arena_bytes(bytes);
  if (used_ > capacity_) std::abort();
  return base_ + start;
}

}  // namespace sidmlp::cpu

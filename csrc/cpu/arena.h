// Scratch memory of one thread: a grow-only, 64-byte aligned block, handed out by bumping an
// offset.
#pragma once

#include <cstddef>

namespace sidmlp::cpu {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Forgets everything handed out and makes room for `bytes`; throws std::bad_alloc. The only call
  // that may allocate.
  void reset(size_t bytes);
  // 64-byte aligned, uninitialised. Asking for more than reset() made room for aborts: it is a bug
  // of this library.
  void* take(size_t bytes);
  // Gives back what was taken after the mark was read.
  size_t mark() const { return used_; }
  void release(size_t mark) { used_ = mark; }

 private:
  char* base_ = nullptr;
  size_t capacity_ = 0;
  size_t used_ = 0;
};

// What `take` consumes for a request of `bytes`.
constexpr size_t arena_bytes(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace sidmlp::cpu

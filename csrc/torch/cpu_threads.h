// Threads of an operator on the CPU, and the table of kernels that it runs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>
#include <mutex>

#include "cpu/kernels.h"
#include "torch/check.h"

namespace sidmlp::torch_ops {

inline int64_t num_threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// body(i, arena) for each i < count on torch's threads; the arena is the thread's own, and body
// resets it. An exception of one of them is thrown here.
template <class Body>
void for_each_item(int64_t count, const Body& body) {
  if (count <= 0) return;
  std::exception_ptr failure;
  std::mutex failure_mutex;
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    try {
      static thread_local cpu::Arena arena;
      for (int64_t i = first; i < last; ++i) body(i, arena);
    } catch (...) {  // an exception must not cross the threads of parallel_for
      const std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

inline const cpu::Kernels& kernels_of(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= 4,
                  "isa: expected 0 (auto), 1 (plain), 2 (avx2), 3 (avx512) or 4 (avx512bf16), got ",
                  isa);
  return cpu::select_kernels(static_cast<cpu::Isa>(isa));
}

}  // namespace sidmlp::torch_ops

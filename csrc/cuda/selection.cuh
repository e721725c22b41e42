// Exact streaming top-n of beam keys by one thread block. Candidates that beat the threshold are
// appended to a buffer in any order; a full buffer is sorted and cut to the n best. Keys are
// unique, so the result does not depend on the order in which threads append.
#pragma once

#include "cuda/block_ops.cuh"
#include "sidmlp/beam_key.h"

namespace sidmlp::cuda {

// Sorts keys[0..n) descending; n is a power of two. Ends with a barrier.
__device__ inline void bitonic_sort(BeamKey* keys, int n) {
  for (int size = 2; size <= n; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const bool descending = (low & size) == 0;
        const BeamKey a = keys[low], b = keys[high];
        if ((a < b) == descending) {
          keys[low] = b;
          keys[high] = a;
        }
      }
      __syncthreads();
    }
  }
}

struct SelectorState {  // in shared memory
  int count;
  BeamKey threshold;  // keys at or below it are known to be outside the top n
};

struct Selector {
  SelectorState* state;
  BeamKey* keys;
  int capacity;  // a power of two, at least num_beams + kThreads
  int num_beams;

  __device__ void clear() const {
    if (threadIdx.x == 0) {
      state->count = 0;
      state->threshold = kNoKey;
    }
    __syncthreads();
  }

  __device__ __forceinline__ BeamKey threshold() const { return state->threshold; }

  // At most one key a thread between two calls of make_room.
  __device__ __forceinline__ void push(BeamKey key) const {
    if (key > threshold()) keys[atomicAdd(&state->count, 1)] = key;
  }

  // Called by all threads; afterwards every thread may push one key.
  __device__ void make_room() const {
    __syncthreads();
    const int count = state->count;
    __syncthreads();  // nobody pushes before everybody has read
    if (count + kThreads > capacity) cut(count);
  }

  // Called by all threads; returns how many keys survive. They lie in keys[0..), best first.
  __device__ int finish() const {
    __syncthreads();
    const int count = state->count;
    __syncthreads();
    cut(count);
    return min(count, num_beams);
  }

 private:
  __device__ void cut(int count) const {
    int size = 1;
    while (size < count) size *= 2;
    for (int i = count + static_cast<int>(threadIdx.x); i < size; i += kThreads) keys[i] = kNoKey;
    __syncthreads();
    bitonic_sort(keys, size);
    if (threadIdx.x == 0 && count >= num_beams) {
      state->count = num_beams;
      state->threshold = keys[num_beams - 1];
    }
    __syncthreads();
  }
};

}  // namespace sidmlp::cuda

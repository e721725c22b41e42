// The best of thousands of keys by one thread block, exactly, for up to kMaxBeams places.
//
// Ranking by counting, as topk.cuh does for few, would compare every survivor with every other.
// Here the histogram becomes the place where each bin's keys begin, survivors are sorted into their
// bins, and a key is compared with those of its own bin only. Where more survive than there is room
// for, the last key is found digit by digit, as in topk.cuh.
#pragma once

#include "cuda/sm90/topk.cuh"

namespace sidmlp::cuda::sm90 {

struct WideTopKState {
  int sums[kWarps];
  int lowest;     // bin that holds a key of the best
  int survivors;  // keys in it or a higher one
  int placed;     // zero between calls
};

struct WideTopK {
  uint32_t* bins;      // [kBins], zero between calls
  BeamKey* survivors;  // [kWideSurvivors]
  WideTopKState* state;
};

struct Scan {
  int before;  // sum over the threads before this one
  int total;
};

// By all threads; `sums` is scratch of kWarps. Ends with a barrier.
__device__ __forceinline__ Scan scan_over_block(int value, int* sums) {
  const int lane = lane_index(), warp = warp_index();
  int sum = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  Scan scan{sum - value, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) scan.before += sums[w];
    scan.total += sums[w];
  }
  __syncthreads();
  return scan;
}

// Turns counts of keys into the place where each bin's keys begin, highest bin first, and finds the
// lowest bin that holds one of the `most` best. By all threads; ends with a barrier.
__device__ __forceinline__ void begin_bins(const WideTopK& top, int most) {
  static_assert(kBins == 4 * kThreads, "a thread has four bins");
  const int tid = static_cast<int>(threadIdx.x), highest = kBins - 1 - 4 * tid;
  auto* bins = reinterpret_cast<uint4*>(top.bins) + (kThreads - 1 - tid);
  const uint4 counts = *bins;
  const int count[4] = {static_cast<int>(counts.w), static_cast<int>(counts.z),
                        static_cast<int>(counts.y), static_cast<int>(counts.x)};
  const Scan scan = scan_over_block(count[0] + count[1] + count[2] + count[3], top.state->sums);
  int begin[4], at = scan.before;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    begin[i] = at;
    at += count[i];
    if (begin[i] < most && at >= most) {
      top.state->lowest = highest - i;
      top.state->survivors = at;
    }
  }
  *bins = uint4{static_cast<uint32_t>(begin[3]), static_cast<uint32_t>(begin[2]),
                static_cast<uint32_t>(begin[1]), static_cast<uint32_t>(begin[0])};
  if (tid == 0 && scan.total < most) {
    top.state->lowest = 0;
    top.state->survivors = scan.total;
  }
  __syncthreads();
}

// As best_keys of topk.cuh; place(rank, key) may be called several times by a thread. Once there
// are more than kThreads keys, they are not read any more when places are found.
template <class Place>
__device__ __forceinline__ int wide_best_keys(const WideTopK& top, const BeamKey* keys, int count,
                                              int most, const Place& place) {
  const int tid = static_cast<int>(threadIdx.x);
  if (count <= kThreads) return rank_keys(keys, count, most, place);
  for (int i = tid; i < count; i += kThreads) {
    const BeamKey key = keys[i];
    if (key != kNoKey) atomicAdd(top.bins + bin_of(key), 1u);
  }
  __syncthreads();
  begin_bins(top, most);
  const int lowest = top.state->lowest;
  int survivors = top.state->survivors;
  const bool overflow = survivors > kWideSurvivors;
  if (overflow) {
    const BeamKey least = nth_key(top.bins, keys, count, most);
    for (int i = tid; i < count; i += kThreads) {
      const BeamKey key = keys[i];
      if (key == kNoKey || key < least) continue;
      const int slot = atomicAdd(&top.state->placed, 1);
      if (slot < kWideSurvivors) top.survivors[slot] = key;  // broken keys may be more
    }
    __syncthreads();
    survivors = min(top.state->placed, kWideSurvivors);
  } else {
    for (int i = tid; i < count; i += kThreads) {
      const BeamKey key = keys[i];
      if (key == kNoKey) continue;
      const int bin = bin_of(key);
      if (bin >= lowest) top.survivors[atomicAdd(top.bins + bin, 1u)] = key;
    }
    __syncthreads();
  }
  for (int i = tid; i < survivors; i += kThreads) {
    const BeamKey key = top.survivors[i];
    int begin = 0, end = survivors;
    if (!overflow) {  // a bin begins where the next higher one has ended
      const int bin = bin_of(key);
      begin = bin + 1 < kBins ? static_cast<int>(top.bins[bin + 1]) : 0;
      end = static_cast<int>(top.bins[bin]);
    }
    int rank = begin;
    for (int j = begin; j < end; ++j) rank += top.survivors[j] > key;
    if (rank < most) place(rank, key);
  }
  __syncthreads();
  reinterpret_cast<uint4*>(top.bins)[tid] = uint4{0, 0, 0, 0};
  if (tid == 0) top.state->placed = 0;  // both published by the barrier before the next keys
  return min(survivors, most);
}

// Moves the `most` best of `count` keys to the front; returns how many there are. Ends with a
// barrier.
__device__ __noinline__ inline int wide_keep_best(uint32_t* bins, BeamKey* survivors,
                                                  WideTopKState* state, BeamKey* keys, int count,
                                                  int most) {
  const WideTopK top{bins, survivors, state};
  const bool few = count <= kThreads;  // the list is still read while places are found
  int at = -1;
  BeamKey own = kNoKey;
  const int found = wide_best_keys(top, keys, count, most, [&](int rank, BeamKey key) {
    if (few) {
      at = rank;
      own = key;
    } else {
      keys[rank] = key;
    }
  });
  if (at >= 0) keys[at] = own;
  __syncthreads();
  return found;
}

}  // namespace sidmlp::cuda::sm90

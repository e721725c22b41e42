// The best of up to several thousand keys by one thread block, exactly, in shared memory.
//
// A histogram over the leading bits of the score finds a bin at or above which at least `most` keys
// lie, usually a few more; these survivors are ranked by counting. Where more survive than there is
// room for (many equal scores, or scores outside the histogram's range), the most-th key is found
// digit by digit instead: slower, and always exact.
#pragma once

#include "cuda/sm90/values.cuh"
#include "sidmlp/beam_key.h"

namespace sidmlp::cuda::sm90 {

// What makes a request's answer empty: no finite score has it, and it beats all others.
constexpr BeamKey kBroken = ~BeamKey{0};

struct TopK {
  uint32_t* bins;      // [kBins], zero between calls
  BeamKey* survivors;  // [kSurvivors]
  int* num_survivors;  // zero between calls
};

// 64 bins an octave for scores between -1024 and -1/64; others fall into the outer bins.
__device__ __forceinline__ int bin_of(BeamKey key) {
  constexpr int kLowest = (0x7fffffff - 0x44800000) >> 17;  // of -1024
  const int bin = static_cast<int>(key >> (32 + 17)) - kLowest;
  return min(max(bin, 0), kBins - 1);
}

// place(rank, key) for the real keys with rank < most, each by one thread, found by counting;
// returns how many there are. Ends with a barrier.
template <class Place>
__device__ __forceinline__ int rank_keys(const BeamKey* from, int count, int most,
                                         const Place& place) {
  const int tid = static_cast<int>(threadIdx.x);
  const bool two = 2 * count <= kThreads;  // threads a key
  const int own = two ? tid / 2 : tid, step = two ? 4 : 2;
  const BeamKey key = own < count ? from[own] : kNoKey;
  int rank = 0;
  if ((two ? (tid & ~31) / 2 : (tid & ~31)) < count) {
    const int even = count & ~1;
#pragma unroll 4
    for (int i = two ? 2 * (tid % 2) : 0; i < even; i += step) {
      const ulonglong2 pair = *reinterpret_cast<const ulonglong2*>(from + i);
      rank += pair.x > key;
      rank += pair.y > key;
    }
    if (even != count && !(two && tid % 2 == 1)) rank += from[even] > key;
    if (two) rank += __shfl_xor_sync(kAllLanes, rank, 1);
  }
  const bool places = key != kNoKey && !(two && tid % 2 == 1);
  if (places && rank < most) place(rank, key);
  return min(__syncthreads_count(places), most);
}

struct Cutoff {
  int bin;
  int survivors;  // keys in this bin or a higher one
};

// By every warp, with the same result: the highest bin at or above which `most` keys lie, or 0.
__device__ __forceinline__ Cutoff find_cutoff(const uint32_t* bins, int most) {
  const int lane = lane_index(), top = kBins - 1 - kWarp * lane;  // this lane's highest bin
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kWarp / 4; ++i) {  // each lane begins elsewhere: no two in one bank
    const int part = 4 * ((i + lane) % 8);
    const uint4 four = *reinterpret_cast<const uint4*>(bins + top - kWarp + 1 + part);
    sum += static_cast<int>(four.x + four.y + four.z + four.w);
  }
  int above = sum;  // keys in this lane's bins and higher
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, above, distance);
    if (lane >= distance) above += other;
  }
  const unsigned enough = __ballot_sync(kAllLanes, above >= most);
  if (enough == 0) return {0, __shfl_sync(kAllLanes, above, kWarp - 1)};
  const int owner = __ffs(static_cast<int>(enough)) - 1;
  const int before = __shfl_sync(kAllLanes, above - sum, owner);
  const int bin = kBins - 1 - kWarp * owner - lane;
  int own = static_cast<int>(bins[bin]);
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, own, distance);
    if (lane >= distance) own += other;
  }
  const unsigned reached = __ballot_sync(kAllLanes, before + own >= most);
  const int found = __ffs(static_cast<int>(reached)) - 1;
  return {kBins - 1 - kWarp * owner - found, __shfl_sync(kAllLanes, before + own, found)};
}

// The most-th greatest of more than `most` real keys, eight bits at a time. Leaves the bins zero.
__device__ __noinline__ inline BeamKey nth_key(uint32_t* bins, const BeamKey* keys, int count,
                                               int most) {
  constexpr int kDigits = 256;
  const int tid = static_cast<int>(threadIdx.x), lane = lane_index();
  BeamKey prefix = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    for (int i = tid; i < kBins; i += kThreads) bins[i] = 0;
    __syncthreads();
    for (int i = tid; i < count; i += kThreads) {
      const BeamKey key = keys[i];
      if (key != kNoKey && (shift == 56 || key >> (shift + 8) == prefix))
        atomicAdd(bins + (key >> shift) % kDigits, 1u);
    }
    __syncthreads();
    // Every warp: lane i has digits 255 - 8i .. 248 - 8i.
    int own = 0;
    for (int i = 0; i < 8; ++i) own += static_cast<int>(bins[kDigits - 1 - 8 * lane - i]);
    int above = own;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, above, distance);
      if (lane >= distance) above += other;
    }
    const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, above >= most))) - 1;
    int before = __shfl_sync(kAllLanes, above - own, owner);
    int digit = kDigits - 1 - 8 * owner;
    while (before + static_cast<int>(bins[digit]) < most) before += static_cast<int>(bins[digit--]);
    most -= before;
    prefix = prefix << 8 | static_cast<BeamKey>(digit);
  }
  __syncthreads();
  for (int i = tid; i < kBins; i += kThreads) bins[i] = 0;
  return prefix;
}

// place(rank, key) for the `most` best real keys, each by one thread; returns how many there are.
// kNoKey is no key; all broken keys have rank 0. Called by all threads after a barrier that
// publishes the keys; ends with one.
template <class Place>
__device__ __forceinline__ int best_keys(const TopK& top, const BeamKey* keys, int count, int most,
                                         const Place& place) {
  const int tid = static_cast<int>(threadIdx.x);
  if (count <= kDirect) return rank_keys(keys, count, most, place);
  for (int i = tid; i < count; i += kThreads) {
    const BeamKey key = keys[i];
    if (key != kNoKey) atomicAdd(top.bins + bin_of(key), 1u);
  }
  __syncthreads();
  const Cutoff cutoff = find_cutoff(top.bins, most);
  BeamKey least = 0;
  int lowest = cutoff.bin;
  if (cutoff.survivors > kSurvivors) {
    least = nth_key(top.bins, keys, count, most);
    lowest = 0;
  }
  for (int i = tid; i < count; i += kThreads) {
    const BeamKey key = keys[i];
    if (key == kNoKey || key < least || bin_of(key) < lowest) continue;
    const int slot = atomicAdd(top.num_survivors, 1);
    if (slot < kSurvivors) top.survivors[slot] = key;  // broken keys may be more
  }
  __syncthreads();
  for (int i = tid; i < kBins; i += kThreads) top.bins[i] = 0;
  const int survivors = min(*top.num_survivors, kSurvivors);
  const int found = rank_keys(top.survivors, survivors, most, place);
  if (tid == 0) *top.num_survivors = 0;  // published by the barrier before the next keys
  return found;
}

// Moves the `most` best of `count` keys to the front; returns how many there are. Rare, and out of
// line: its arguments are values, so that nothing of the caller's must lie in memory.
__device__ __noinline__ inline int keep_best(uint32_t* bins, BeamKey* survivors, int* num_survivors,
                                             BeamKey* keys, int count, int most) {
  int place = -1;  // of a thread's key: the list is still read while places are found
  BeamKey own = kNoKey;
  const int found = best_keys(TopK{bins, survivors, num_survivors}, keys, count, most,
                              [&](int rank, BeamKey key) {
                                place = rank;
                                own = key;
                              });
  if (place >= 0) keys[place] = own;
  __syncthreads();
  return found;
}

}  // namespace sidmlp::cuda::sm90

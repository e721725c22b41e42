// Log-probabilities of a beam's children, whose logits lie where their keys go, and the keys.
#pragma once

#include "cuda/sm90/candidates.cuh"

namespace sidmlp::cuda::sm90 {

// Over children or over all codes; of logits times the inverse temperature.
struct Softmax {
  float largest;    // NaN: some logit is not finite
  float log_total;  // of exp(logit - largest)
};

__device__ __forceinline__ float listed_logit(const BeamKey* place) {
  return *reinterpret_cast<const float*>(place);
}

// Reductions over kLanes neighbouring lanes of a warp; every lane gets the result.
template <int kLanes>
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// Of logits that come one after the other, by one lane, without keeping them.
struct RunningSoftmax {
  float largest = -INFINITY, total = 0.0f;
  bool finite = true;

  // The largest of the logits that `total` is about to take.
  __device__ __forceinline__ void raise(float highest) {
    if (highest > largest) {
      total *= __expf(largest - highest);
      largest = highest;
    }
  }
  // This lane's share of up to kChunk logits that kLanes lanes take.
  template <int kLanes>
  __device__ __forceinline__ void add(const float* logits, int width, float scale) {
    constexpr int kOwn = kChunk / kLanes;
    float own[kOwn];
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      const int at = kLanes * i + 4 * (lane_index() % kLanes);
      const float4 four = *reinterpret_cast<const float4*>(logits + at);
      const float raw[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        own[i + j] = -INFINITY;
        if (at + j >= width) continue;
        own[i + j] = scale * raw[j];
        finite = finite && isfinite(own[i + j]);
        highest = fmaxf(highest, own[i + j]);
      }
    }
    raise(highest);
    if (highest == -INFINITY) return;  // none
#pragma unroll
    for (int i = 0; i < kOwn; ++i) total += __expf(own[i] - largest);
  }
  // Of all logits of kLanes neighbouring lanes.
  template <int kLanes>
  __device__ __forceinline__ Softmax over_lanes() const {
    const float most = lanes_max<kLanes>(largest);
    const float share = total == 0.0f ? 0.0f : total * __expf(largest - most);
    const float sum = lanes_sum<kLanes>(share);
    const unsigned wrong = __ballot_sync(kAllLanes, !finite) >> (lane_index() & ~(kLanes - 1));
    const bool broken = (wrong & (kAllLanes >> (kWarp - kLanes))) != 0;
    return {broken ? NAN : most, __logf(sum)};
  }
};

// Of `count` logits in a list, by kLanes neighbouring lanes.
template <int kLanes>
__device__ __forceinline__ Softmax softmax_of_list(const BeamKey* list, int count, float scale) {
  const int lane = lane_index() % kLanes;
  RunningSoftmax own;
  for (int j = lane; j < count; j += kLanes) {
    const float logit = scale * listed_logit(list + j);
    own.finite = own.finite && isfinite(logit);
    own.largest = fmaxf(own.largest, logit);
  }
  __syncwarp();
  own.largest = lanes_max<kLanes>(own.largest);
  for (int j = lane; j < count; j += kLanes)
    own.total += __expf(scale * listed_logit(list + j) - own.largest);
  __syncwarp();
  return own.over_lanes<kLanes>();
}

}  // namespace sidmlp::cuda::sm90

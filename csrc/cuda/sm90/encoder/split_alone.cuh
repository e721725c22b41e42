// A request in one block: the residual is the accumulator of the products that add to it.
#pragma once

#include "cuda/sm90/encoder/split.cuh"

namespace sidmlp::cuda::sm90 {

template <class W, bool kRelu>
struct AloneEncoder : SplitEncoder<W, kRelu, 1> {
  __device__ __forceinline__ void norm_scale(float (&scale)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        sum = fmaf(this->x[j][2 * r], this->x[j][2 * r],
                   fmaf(this->x[j][2 * r + 1], this->x[j][2 * r + 1], sum));
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      scale[r] = rsqrtf(sum * (1.0f / kWideDim) + this->problem.model.layer_norm_eps);
    }
  }
  __device__ __forceinline__ const float* gains(int index) const {
    return this->shared().bias +
           (this->part.heads * (2 * this->problem.tokens.tokens - 1) + 3) / 4 * 4 +
           index * kWideDim;
  }
  // Normed rows of x -> a. Those without a token hold what they will: nobody reads their keys.
  __device__ __forceinline__ void norm(const float* gain) {
    float scale[2];
    norm_scale(scale);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 w = *reinterpret_cast<const float2*>(gain + 8 * j + 2 * (this->lane % 4));
#pragma unroll
      for (int r = 0; r < 2; ++r)
        this->a[j / 2][j % 2 * 2 + r] = narrow_two<W>(this->x[j][2 * r] * scale[r] * w.x,
                                                      this->x[j][2 * r + 1] * scale[r] * w.y);
    }
  }
  __device__ __forceinline__ void encode() {
    const int t = this->lane % 4;
    const int first = 16 * this->warp + this->lane / 4;
    const int64_t ids[2] = {this->id_of(first), this->id_of(first + 8)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const W* from = this->embedding_of(ids[r]);
      const float none = first + 8 * r < this->count ? __int_as_float(0x7fc00000) : 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float2 two{none, none};
        if (from != nullptr)
          two = widen_two<W>(__ldg(reinterpret_cast<const uint32_t*>(from + 8 * j + 2 * t)));
        this->x[j][2 * r] = two.x, this->x[j][2 * r + 1] = two.y;
      }
    }
#pragma unroll 1
    for (int l = 0; l < this->problem.model.num_layers; ++l) {
      norm(gains(2 * l));
      this->attention();
      norm(gains(2 * l + 1));
      this->feed_forward();
    }
    float scale[2];
    norm_scale(scale);
    const float* gain = gains(2 * this->problem.model.num_layers);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * this->warp + this->lane / 4 + 8 * r;
      if (row >= this->count) continue;
      W* to = this->states_of(row) + 2 * t;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 w = *reinterpret_cast<const float2*>(gain + 8 * j + 2 * t);
        *reinterpret_cast<uint32_t*>(to + 8 * j) = narrow_two<W>(
            this->x[j][2 * r] * scale[r] * w.x, this->x[j][2 * r + 1] * scale[r] * w.y);
      }
    }
  }
};

}  // namespace sidmlp::cuda::sm90

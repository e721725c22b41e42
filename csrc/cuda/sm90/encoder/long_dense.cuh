// The dense phases of the long form: everything of a tile that other rows do not enter.
#pragma once

#include "cuda/sm90/encoder/long.cuh"

namespace sidmlp::cuda::sm90 {

template <class W, int kDim, bool kRelu>
struct LongDense {
  using Sizes = LongSizes<kDim>;
  static constexpr int kHalves = Sizes::kHalves;  // of the accumulator: 128 columns each

  const EncodeT5Problem& problem;
  const LongShape& shape;
  char* workspace;
  const int group, warp, lane;  // warpgroup, warp in it
  LongRing ring;
  int64_t request;  // of the batch
  int tile, first;  // of the workspace; its first row, of the request's
  bool valid[2];    // whether rows g and g + 8 of this warp have a token
  float x[kHalves][16][4];

  __device__ __forceinline__ float& at(int j, int e) { return x[j / 16][j % 16][e]; }
  __device__ __forceinline__ float at(int j, int e) const { return x[j / 16][j % 16][e]; }
  __device__ __forceinline__ uint32_t normed() const {
    return ptx::shared_address(long_shared().normed) + group * (kLongBiasBytes / 2);
  }
  __device__ __forceinline__ uint32_t staging() const {
    return ptx::shared_address(long_shared().staging) + (4 * group + warp) * 16 * kRowBytes;
  }
  __device__ __forceinline__ int* positions() const {  // of this warp's rows
    return reinterpret_cast<int*>(workspace + shape.position) + kLongRows * tile + 16 * warp;
  }
  __device__ __forceinline__ float4* residual() const {  // of this lane
    return reinterpret_cast<float4*>(workspace + shape.x) +
           (static_cast<int64_t>(4 * tile + warp) * (kDim / 8)) * kWarp + lane;
  }

  // ---- the residual ----

  // Positions of this warp's rows, of a request whose tokens have gaps: from the mask.
  __device__ __forceinline__ void find_positions(int count) {
    const TokensView& tokens = problem.tokens;
    const uint8_t* mask = tokens.mask + request * tokens.tokens;
    const int low = first + 16 * warp;
    if (low >= count) return;
    int before = 0;
    for (int begin = 0; begin < tokens.tokens && before < low + 16; begin += 8 * kWarp) {
      bool set[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int t = begin + kWarp * i + lane;
        set[i] = t < tokens.tokens && __ldg(mask + t) != 0;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned all = __ballot_sync(kAllLanes, set[i]);
        const int row = before + __popc(all & ((1u << lane) - 1)) - low;
        if (set[i] && row >= 0 && row < 16) positions()[row] = begin + kWarp * i + lane;
        before += __popc(all);
      }
    }
  }
  __device__ __forceinline__ void embed(int count, int begin) {
    const TokensView& tokens = problem.tokens;
    const T5View& model = problem.model;
    if (lane < 16) {
      const int row = first + 16 * warp + lane;
      if (begin >= 0 || row >= count) positions()[lane] = row < count ? begin + row : 0;
    }
    if (begin < 0) find_positions(count);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const W* embedding = nullptr;
      if (valid[r]) {
        const int position = __ldcg(positions() + lane / 4 + 8 * r);
        const int64_t id = __ldg(tokens.ids + request * tokens.tokens + position);
        if (id >= 0 && id < model.vocab_size)
          embedding = static_cast<const W*>(model.embedding) + id * kDim;
      }
      const float none = valid[r] ? __int_as_float(0x7fc00000) : 0.0f;  // an unknown id: NaN
#pragma unroll
      for (int j = 0; j < (kDim / 8); ++j) {
        float2 two{none, none};
        if (embedding != nullptr)
          two = widen_two<W>(
              __ldg(reinterpret_cast<const uint32_t*>(embedding + 8 * j + lane % 4 * 2)));
        at(j, 2 * r) = two.x, at(j, 2 * r + 1) = two.y;
      }
    }
  }
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int j = 0; j < (kDim / 8); ++j) {
      const float4 v = __ldcg(residual() + j * kWarp);
      at(j, 0) = v.x, at(j, 1) = v.y, at(j, 2) = v.z, at(j, 3) = v.w;
    }
  }
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int j = 0; j < (kDim / 8); ++j)
      __stcg(residual() + j * kWarp, float4{at(j, 0), at(j, 1), at(j, 2), at(j, 3)});
  }

  __device__ __forceinline__ void norm_scale(float (&scale)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < (kDim / 8); ++j)
        sum = fmaf(at(j, 2 * r), at(j, 2 * r), fmaf(at(j, 2 * r + 1), at(j, 2 * r + 1), sum));
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      scale[r] = rsqrtf(sum * (1.0f / kDim) + problem.model.layer_norm_eps);
    }
  }
  // Normed rows of x -> shared memory of this warpgroup. Rows without a token become zeros.
  __device__ __forceinline__ void norm(const float* gain) const {
    float scale[2];
    norm_scale(scale);
    const int row = lane % 8 + lane / 8 % 2 * 8;
    const uint32_t to = normed() + (16 * warp + row) * kRowBytes;
    ptx::named_barrier(1 + group, 128);  // the other warps' products have read the last rows
#pragma unroll
    for (int j = 0; j < (kDim / 8); j += 2) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 w = __ldg(reinterpret_cast<const float2*>(gain + 8 * (j + i) + lane % 4 * 2));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float low = at(j + i, 2 * r) * scale[r] * w.x;
          const float high = at(j + i, 2 * r + 1) * scale[r] * w.y;
          word[2 * i + r] = valid[r] ? narrow_two<W>(low, high) : 0;
        }
      }
      const uint32_t piece = (j % 8 + lane / 16) ^ (row & 7);
      ptx::store_matrices(to + j / 8 * kLongBlock + 16 * piece, word[0], word[1], word[2], word[3]);
    }
    ptx::async_fence();
    ptx::named_barrier(1 + group, 128);
  }

  // ---- products ----
  //
  // A piece is released when the next one's product has begun and its own is done.

  __device__ __forceinline__ static uint64_t step(int k) { return 2 * k; }  // of 16 along k

  // x += mixed values times the output matrix.
  __device__ __forceinline__ void attention_out(int heads) {
#pragma unroll 1
    for (int head = 0; head < heads; ++head) {
      const uint64_t rows = ptx::swizzled_descriptor(here(ring.await() + group * kLongBlock));
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        const uint64_t columns = ptx::swizzled_descriptor(here(ring.await(1 + half)));
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k)
          ptx::wgmma_shared<W, true>(x[half], rows + step(k), columns + step(k));
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < 1 + kHalves; ++i) ring.release();
    }
  }
  // 128 columns of the normed rows' product with a weight matrix [.., D].
  __device__ __forceinline__ void in_product(float (&sum)[16][4]) {
    const uint64_t rows = ptx::swizzled_descriptor(here(normed()));
#pragma unroll
    for (int q = 0; q < Sizes::kWide; ++q) {
      const uint64_t columns = ptx::swizzled_descriptor(here(ring.await(q > 0)));
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const uint64_t a = rows + q * (kLongBlock / 16) + step(k);
        if (q == 0 && k == 0) {
          ptx::wgmma_shared<W, false>(sum, a, columns);
        } else {
          ptx::wgmma_shared<W, true>(sum, a, columns + step(k));
        }
      }
      ptx::wgmma_commit();
      if (q > 0) {
        ptx::wgmma_wait<1>();
        ring.release();
      }
    }
    ptx::wgmma_wait<0>();
    ring.release();
  }
  __device__ __forceinline__ void feed_forward(int chunks) {
    const auto act = [](float v, int) {
      return kRelu ? activate<W>(Activation::kRelu, v) : activate<W>(Activation::kGelu, v);
    };
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint32_t hidden[8][4];
      {
        float sum[16][4];
        in_product(sum);
        to_operand<W>(sum, hidden, act);
      }
#pragma unroll
      for (int q = 0; q < 2 * kHalves; ++q) {  // 64 k, all halves, then the other 64 k
        const uint64_t columns = ptx::swizzled_descriptor(here(ring.await(q > 0)));
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t (&a)[4] = hidden[4 * (q / kHalves) + k];
          ptx::wgmma_registers<W, true>(x[q % kHalves], a[0], a[1], a[2], a[3], columns + step(k));
        }
        ptx::wgmma_commit();
        if (q > 0) {
          ptx::wgmma_wait<1>();
          ring.release();
        }
      }
      ptx::wgmma_wait<0>();
      ring.release();
    }
  }

  // Columns 64 half .. of a product -> block `block` of this tile.
  __device__ __forceinline__ void store_block(const float (&sum)[16][4], int half, int64_t block) {
    float own[8][4];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) own[j][e] = sum[8 * half + j][e];
    long_store_rows<W>(own, staging(), workspace + shape.qkv + block * kLongBlock, warp);
  }
  __device__ __forceinline__ void project(int heads) {
#pragma unroll 1
    for (int column = 0; column < 3 * heads; column += 2) {
      float sum[16][4];
      in_product(sum);
      const int64_t block = static_cast<int64_t>(tile) * 3 * heads + column;
      store_block(sum, 0, block);
      if (column + 1 < 3 * heads) store_block(sum, 1, block + 1);
    }
  }
  __device__ __forceinline__ void store_states() const {
    const T5View& model = problem.model;
    float scale[2];
    norm_scale(scale);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!valid[r]) continue;
      const int position = __ldcg(positions() + lane / 4 + 8 * r);
      W* to = static_cast<W*>(problem.states) +
              (request * problem.tokens.tokens + position) * kDim + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < (kDim / 8); ++j) {
        const float2 w =
            __ldg(reinterpret_cast<const float2*>(model.final_gain + 8 * j + lane % 4 * 2));
        *reinterpret_cast<uint32_t*>(to + 8 * j) =
            narrow_two<W>(at(j, 2 * r) * scale[r] * w.x, at(j, 2 * r + 1) * scale[r] * w.y);
      }
    }
  }

  // ---- a phase ----

  __device__ __forceinline__ void take_tile(const LongSegment& segment, int layer) {
    const T5View& model = problem.model;
    const auto& shared = long_shared();
    const int own = uniform(segment.request_of(shared.tiles_before, tile));
    request = segment.first + own;
    first = kLongRows * (tile - uniform(shared.tiles_before[own]));
    const int2 tokens = shared.tokens[own];
    const int count = uniform(tokens.x), row = first + 16 * warp + lane / 4;
    valid[0] = row < count, valid[1] = row + 8 < count;
    if (layer == 0) {
      embed(count, uniform(tokens.y));
    } else {
      load();
      attention_out(model.num_heads);
      norm(model.layers[layer - 1].ffn_gain);
      feed_forward(model.ffn_dim / 128);
    }
    if (layer == model.num_layers) {
      store_states();
      return;
    }
    store();
    norm(model.layers[layer].attention_gain);
    project(model.num_heads);
  }
  // What comes before layer `layer`, of all tiles; after the last layer the states.
  __device__ __forceinline__ void run(const LongSegment& segment, int layer) {
    const Sizes sizes(problem.model);
    for (int item = static_cast<int>(blockIdx.x); 2 * item < segment.tiles;
         item += static_cast<int>(gridDim.x)) {
      tile = 2 * item + group;
      if (tile < segment.tiles) {
        take_tile(segment, layer);
      } else {
        ring.pass(sizes.dense_pieces(layer));
      }
    }
  }
};

}  // namespace sidmlp::cuda::sm90

// A request in a cluster: each block computes its heads' or its columns' part of what is added to
// the residual, for all rows, and finishes some rows itself: it holds their residual, takes its
// peers' parts of them, adds all parts in the order of the blocks, and gives the normed rows to
// everyone.
//
// Both ways are bulk copies from shared memory to shared memory that complete on a barrier of the
// receiver; no barrier of the whole cluster is needed. A block sends parts only when it has
// everybody's normed rows, and normed rows only when it has everybody's parts, so nothing that is
// still read or awaited is overwritten. For that a block without heads sends 16 bytes of no
// meaning.
#pragma once

#include "cuda/sm90/encoder/split.cuh"

namespace sidmlp::cuda::sm90 {

template <class W, bool kRelu, int kBlocks>
struct ClusterEncoder : SplitEncoder<W, kRelu, kBlocks> {
  using Base = SplitEncoder<W, kRelu, kBlocks>;
  static constexpr int kWarpRows = 16 / kBlocks;  // the most of the block's own rows in a warp
  static constexpr int kToken = 16;

  int sums, rounds;  // parities of `reduced` and of `gathered`
  float4 residual[kWarpRows];

  // Of the request's rows each block finishes as many, in a row.
  __device__ __forceinline__ int own_rows() const { return 16 / kBlocks * this->tiles; }
  // Own row i of this warp, among all; not below the end: none.
  __device__ __forceinline__ int row_of(int i) const {
    const int own = this->warp + 4 * this->active * i;
    return own < own_rows() ? this->rank * own_rows() + own : kSplitRows;
  }
  // Rows of sums are 16 chunks of 32 bytes, chunk c at c ^ (row % 4): then neither a warp's
  // accumulators nor a row in one piece meets a bank twice. This lane's four columns of a row:
  __device__ __forceinline__ int column_of(int row) const {
    return 8 * (this->lane / 2 ^ (row & 3)) + this->lane % 2 * 4;
  }
  // Blocks that have heads, or columns: a bit each.
  __device__ __forceinline__ int working(bool heads) const {
    int blocks = 0;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const SplitPart part(this->problem.model, block, kBlocks);
      blocks |= ((heads ? part.heads : part.chunks) > 0 ? 1 : 0) << block;
    }
    return blocks;
  }
  __device__ __forceinline__ static uint32_t of_peer(const void* own, int block) {
    return ptx::peer_address(own, static_cast<uint32_t>(block));
  }

  // This block's part of the sums -> its peers, each its own rows.
  __device__ __forceinline__ void send_sums(int workers, bool heads) {
    auto& shared = this->shared();
    const bool mine = (workers >> this->rank & 1) != 0;
    const int own = own_rows(), lane = this->lane, g = lane / 4, t = lane % 4;
    const uint32_t from = ptx::shared_address(shared.heads);
    if (heads) this->barrier();  // keys and values, where the sums go, were read
    if (mine) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = 16 * this->warp + g + 8 * r;
#pragma unroll
        for (int j = 0; j < 16; ++j)
          ptx::store_floats(from + row * kSumBytes + 32 * (j ^ (row & 3)) + 8 * t,
                            this->x[j][2 * r], this->x[j][2 * r + 1]);
      }
      ptx::async_fence();
    }
    this->barrier();
    if (this->warp != 0) return;
    if (lane < kBlocks && lane != this->rank) {
      const int slot = this->rank < lane ? this->rank : this->rank - 1;
      ptx::bulk_copy_to_peer(of_peer(shared.received[slot], lane), from + lane * own * kSumBytes,
                             mine ? own * kSumBytes : kToken, of_peer(&shared.reduced, lane));
    }
    if (lane == 0) {
      const int others = __popc(workers & ~(1 << this->rank));
      ptx::barrier_expect(ptx::shared_address(&shared.reduced),
                          others * own * kSumBytes + (kBlocks - 1 - others) * kToken);
    }
  }

  // residual += all parts of own rows.
  __device__ __forceinline__ void add_sums(int workers) {
    auto& shared = this->shared();
    while (!ptx::barrier_try(ptx::shared_address(&shared.reduced), sums)) {
    }
    sums ^= 1;
    const uint32_t own_sums = ptx::shared_address(shared.heads);
    const uint32_t received = ptx::shared_address(shared.received);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      // A row that is none reads another: branches would make the rows wait for each other.
      const int own = min(this->warp + 4 * this->active * i, own_rows() - 1);
      const int row = this->rank * own_rows() + own;
      float4 part[kBlocks];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const int slot = block < this->rank ? block : block - 1;
        const uint32_t from = block == this->rank
                                  ? own_sums + row * kSumBytes
                                  : received + slot * Base::Shared::kPeerBytes + own * kSumBytes;
        part[block] = (workers >> block & 1) != 0 ? ptx::load_floats(from + 16 * this->lane)
                                                  : float4{0.0f, 0.0f, 0.0f, 0.0f};
      }
      float4 sum = part[0];
#pragma unroll
      for (int block = 1; block < kBlocks; ++block) {
        sum.x += part[block].x, sum.y += part[block].y;
        sum.z += part[block].z, sum.w += part[block].w;
      }
      residual[i].x += sum.x, residual[i].y += sum.y;
      residual[i].z += sum.z, residual[i].w += sum.w;
    }
  }

  __device__ __forceinline__ void norm_rows(const float4& gain, uint2 (&normed)[kWarpRows]) const {
    float squares[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const float4& v = residual[i];
      squares[i] = (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
    }
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i)
        squares[i] += __shfl_xor_sync(kAllLanes, squares[i], distance);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const float4& v = residual[i];
      const float scale =
          rsqrtf(squares[i] * (1.0f / kWideDim) + this->problem.model.layer_norm_eps);
      normed[i] = {narrow_two<W>(v.x * scale * gain.x, v.y * scale * gain.y),
                   narrow_two<W>(v.z * scale * gain.z, v.w * scale * gain.w)};
    }
  }
  // Rows of a warp are a multiple of 4 apart, so that their columns are the same.
  __device__ __forceinline__ float4 gain_of(const float* gain) const {
    return __ldg(reinterpret_cast<const float4*>(gain + column_of(row_of(0))));
  }

  // Own rows normed -> every block; then those of all blocks are here.
  __device__ __forceinline__ void share_rows(const float4& gain) {
    auto& shared = this->shared();
    const int own = own_rows(), lane = this->lane;
    const uint32_t normed = ptx::shared_address(shared.normed);
    uint2 words[kWarpRows];
    norm_rows(gain, words);
    const int column = column_of(row_of(0));
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int row = row_of(i);
      if (row == kSplitRows) continue;
      const uint32_t piece = column % 64 / 8 ^ (row & 7);
      ptx::store_half_piece(normed + column / 64 * kSplitRows * kRowBytes + row * kRowBytes +
                                16 * piece + column % 8 * 2,
                            words[i]);
    }
    ptx::async_fence();
    this->barrier();
    if (this->warp == 0) {
      const int block = lane / 2;
      if (block < kBlocks && block != this->rank) {
        const int at = lane % 2 * kSplitRows * kRowBytes + this->rank * own * kRowBytes;
        ptx::bulk_copy_to_peer(of_peer(shared.normed + at, block), normed + at, own * kRowBytes,
                               of_peer(&shared.gathered, block));
      }
      if (lane == 0)
        ptx::barrier_expect(ptx::shared_address(&shared.gathered),
                            (kBlocks - 1) * own * 2 * kRowBytes);
    }
    while (!ptx::barrier_try(ptx::shared_address(&shared.gathered), rounds)) {
    }
    rounds ^= 1;
    __syncwarp();
  }

  __device__ __forceinline__ void clear_part() {
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) this->x[j][e] = 0.0f;
  }

  __device__ __forceinline__ void encode() {
    const T5View& model = this->problem.model;
    auto& shared = this->shared();
    const int head_blocks = working(true), chunk_blocks = working(false);
    float4 gain = gain_of(model.layers[0].attention_gain);
    int64_t ids[kWarpRows];
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) ids[i] = this->id_of(row_of(i));
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      // Read without a branch, so that no row waits for another; of an unknown id: NaN.
      const W* from = this->embedding_of(ids[i]);
      const bool known = from != nullptr;
      if (!known) from = static_cast<const W*>(model.embedding);
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from + column_of(row_of(0))));
      const float2 low = widen_two<W>(raw.x), high = widen_two<W>(raw.y);
      const float none = row_of(i) < this->count ? __int_as_float(0x7fc00000) : 0.0f;
      residual[i] = {known ? low.x : none, known ? low.y : none, known ? high.x : none,
                     known ? high.y : none};
    }
    // Rows of the warpgroups beyond the tiles: nobody sends them, and products read them.
    for (int i = 16 * this->tiles * 8 + 32 * this->warp + this->lane; i < 64 * this->active * 8;
         i += 128 * this->active) {
      *reinterpret_cast<uint4*>(shared.normed + 16 * i) = uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(shared.normed + kSplitRows * kRowBytes + 16 * i) =
          uint4{0, 0, 0, 0};
    }
    share_rows(gain);
#pragma unroll 1
    for (int l = 0; l < model.num_layers; ++l) {
      const bool last = l + 1 == model.num_layers;
      clear_part();
      gain = gain_of(model.layers[l].ffn_gain);
      if (this->part.heads > 0) this->attention();
      send_sums(head_blocks, true);
      add_sums(head_blocks);
      share_rows(gain);
      clear_part();
      gain = gain_of(last ? model.final_gain : model.layers[l + 1].attention_gain);
      if (this->part.chunks > 0) this->feed_forward();
      send_sums(chunk_blocks, false);
      add_sums(chunk_blocks);
      if (!last) share_rows(gain);
    }
    uint2 words[kWarpRows];
    norm_rows(gain, words);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int row = row_of(i);
      if (row < this->count)
        *reinterpret_cast<uint2*>(this->states_of(row) + column_of(row)) = words[i];
    }
  }
};

}  // namespace sidmlp::cuda::sm90

// Context readout: what reads states. The valid ones -> rows of W in shared memory; then their
// mean, or scores, softmax and the weighted sum y_h of each head, on tensor cores.
#pragma once

#include <type_traits>

#include "cuda/block_ops.cuh"
#include "cuda/ptx/matrices.cuh"
#include "cuda/sm90/readout_group.cuh"

namespace sidmlp::cuda::sm90 {

// The next states of `slot` -> their tokens, by a warp.
template <class W>
__device__ __forceinline__ void Readout<W>::collect(int slot, bool restart) const {
  constexpr int kAhead = 4;  // loads in flight
  const int lane = lane_index(), tokens = source.tokens;
  const uint8_t* mask = source.mask + (begin + first_request() + slot) * tokens;
  int* list = at<int>(shape.tokens) + slot * shape.chunk;
  Cursor* cursor = at<Cursor>(shape.cursors) + slot;
  int next = restart ? 0 : cursor->next, count = 0;
  const int before = restart ? 0 : cursor->total;
  __syncwarp();
  while (next < tokens && count < shape.chunk) {
    bool valid[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t token = static_cast<int64_t>(next) + kWarp * i + lane;
      valid[i] = token < tokens && __ldg(mask + token) != 0;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (count >= shape.chunk || next >= tokens) break;
      const unsigned ballot = __ballot_sync(kAllLanes, valid[i]);
      const int place = count + __popc(ballot & ((1u << lane) - 1));
      if (valid[i] && place < shape.chunk) list[place] = next + lane;
      const int room = shape.chunk - count, found = __popc(ballot);
      if (found > room) {  // the rest comes with the next chunk
        next += __fns(ballot, 0, room) + 1;
        count = shape.chunk;
      } else {
        next = min(static_cast<int64_t>(next) + kWarp, static_cast<int64_t>(tokens));
        count += found;
      }
    }
  }
  if (lane == 0) *cursor = {next, count, before + count};
  __syncwarp();
}

// Eight elements of the states from element `from` on, as W. `aligned`: to 16 bytes.
template <class W>
__device__ __forceinline__ uint4 Readout<W>::eight(int64_t from, bool aligned) const {
  float x[8];
  if (source.dtype == DType::kFloat32) {
    const float* values = static_cast<const float*>(source.states) + from;
    if (aligned) {
      const float4 low = load_four(values), high = load_four(values + 4);
      x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
      x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    } else {
      for (int i = 0; i < 8; ++i) x[i] = __ldg(values + i);
    }
  } else {
    const auto* values = static_cast<const uint16_t*>(source.states) + from;
    uint4 raw;
    if (aligned) {
      raw = __ldg(reinterpret_cast<const uint4*>(values));
    } else {
      uint32_t half[8];
      for (int i = 0; i < 8; ++i) half[i] = __ldg(values + i);
      raw = {half[0] | half[1] << 16, half[2] | half[3] << 16, half[4] | half[5] << 16,
             half[6] | half[7] << 16};
    }
    if (source.dtype == view.dtype) return raw;
    if (source.dtype == DType::kBFloat16) {
      widen_eight<__nv_bfloat16>(raw, x);
    } else {
      widen_eight<__half>(raw, x);
    }
  }
  return {narrow_two<W>(x[0], x[1]), narrow_two<W>(x[2], x[3]), narrow_two<W>(x[4], x[5]),
          narrow_two<W>(x[6], x[7])};
}

// The next chunk of states of the block's requests -> shared memory; rows up to a multiple of 16
// are zeros. Ends with a barrier.
template <class W>
__device__ __forceinline__ void Readout<W>::load_states(bool restart) const {
  const int count = own();
  if (!restart) __syncthreads();  // all have seen that there is more
  if (warp_index() < count) collect(warp_index(), restart);
  __syncthreads();
  const bool aligned = reinterpret_cast<uintptr_t>(source.states) % 16 == 0;
  const bool copied = aligned && source.dtype == view.dtype;
  constexpr int kLanes = 16;  // threads of a row
  const int tid = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int slot = 0; slot < count; ++slot) {
    const int* list = at<int>(shape.tokens) + slot * shape.chunk;
    const int valid = at<Cursor>(shape.cursors)[slot].count, rows = (valid + 15) / 16 * 16;
    const int64_t first = (begin + first_request() + slot) * source.tokens * dim();
#pragma unroll 1
    for (int row = tid / kLanes; row < rows; row += kThreads / kLanes) {
      const int64_t from = first + static_cast<int64_t>(row < valid ? list[row] : 0) * dim();
      char* to = states(slot) + row * shape.state_bytes;
#pragma unroll 1
      for (int i = 8 * (tid % kLanes); i < dim(); i += 8 * kLanes) {
        if (row >= valid) {
          *reinterpret_cast<uint4*>(to + 2 * i) = {0, 0, 0, 0};
        } else if (copied) {
          ptx::copy_piece(ptx::shared_address(to + 2 * i),
                          static_cast<const W*>(source.states) + from + i);
        } else {
          *reinterpret_cast<uint4*>(to + 2 * i) = eight(from + i, aligned);
        }
      }
    }
  }
  ptx::wait_copies();
  __syncthreads();
}

template <class W>
__device__ __forceinline__ bool Readout<W>::more() const {
  bool found = false;
  for (int slot = 0; slot < own(); ++slot)
    found |= at<Cursor>(shape.cursors)[slot].next < source.tokens;
  return found;
}

// ---- attention ----

// This lane's row of 16, for load_matrices; rows past the last are read as the last.
template <class W>
__device__ __forceinline__ uint32_t Readout<W>::left_rows(const char* rows, int bytes,
                                                          int count) const {
  const int lane = lane_index();
  return ptx::shared_address(rows + min(lane % 16, count - 1) * bytes + lane / 16 * 16);
}

// r_h x_t of the states in shared memory.
template <class W>
__device__ __forceinline__ void Readout<W>::score() const {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const Divider tiles(shape.chunk / 16);
  const int row_tiles = (heads() + 15) / 16;
#pragma unroll 1
  for (int task = warp_index(); task < own() * row_tiles * tiles.n; task += kWarps) {
    const int rest = tiles.quotient(task), tile = task - rest * tiles.n;
    const int slot = row_tiles == 1 ? rest : rest / row_tiles;
    const int head = 16 * (rest - slot * row_tiles);
    if (16 * tile >= at<Cursor>(shape.cursors)[slot].count) continue;
    const uint32_t rows = left_rows(head_row(slot, head), shape.state_bytes, heads() - head);
    const uint32_t columns = ptx::shared_address(
        states(slot) + (16 * tile + lane % 8 + lane / 16 * 8) * shape.state_bytes +
        lane / 8 % 2 * 16);
    float sum[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < dim(); k += 16) {
      uint32_t a[4], b[4];
      ptx::load_matrices(a, rows + 2 * k);
      ptx::load_matrices(b, columns + 2 * k);
      ptx::mma<W>(sum[0], a[0], a[1], a[2], a[3], b[0], b[1]);
      ptx::mma<W>(sum[1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (head + g + 8 * r >= heads()) continue;
      auto* to = reinterpret_cast<float2*>(score_row(slot, head + g + 8 * r)) + 8 * tile + t;
      to[0] = {sum[0][2 * r], sum[0][2 * r + 1]};
      to[4] = {sum[1][2 * r], sum[1][2 * r + 1]};
    }
  }
  __syncthreads();
}

// Scores -> exp(score - largest so far) as W, in their place; zeros up to a multiple of 16.
template <class W>
__device__ __forceinline__ void Readout<W>::soften(bool first) const {
  constexpr int kOwn = kMostStateRows / kWarp;
  const int lane = lane_index();
  const Divider num_heads(heads());
#pragma unroll 1
  for (int task = warp_index(); task < own() * num_heads.n; task += kWarps) {
    const int slot = num_heads.quotient(task), head = task - slot * num_heads.n;
    const int count = at<Cursor>(shape.cursors)[slot].count;
    if (!first && count == 0) continue;
    float* row = reinterpret_cast<float*>(score_row(slot, head));
    float* total = totals(slot, head);
    const float before = first ? -kLargestFinite : total[0];
    float x[kOwn], largest = before, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      x[i] = lane + kWarp * i < count ? row[lane + kWarp * i] : -kLargestFinite;
      largest = fmaxf(largest, x[i]);
    }
    largest = warp_max(largest);
    __syncwarp();  // the row is read
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = lane + kWarp * i;
      if (at >= (count + 15) / 16 * 16) continue;
      const W weight = narrow(at < count ? expf(x[i] - largest) : 0.0f);
      reinterpret_cast<W*>(row)[at] = weight;
      sum += widen(weight);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const float factor = expf(before - largest);
      total[0] = largest;
      total[1] = first ? sum : fmaf(total[1], factor, sum);
      total[2] = factor;
    }
  }
  __syncthreads();
}

template <class W>
__device__ __forceinline__ W Readout<W>::narrow(float x) {
  if constexpr (std::is_same_v<W, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two columns of sums over states -> where they go: means (no heads), or y_h in the place of r_h.
template <class W>
__device__ __forceinline__ void Readout<W>::store_pooled(bool attends, int slot, int head,
                                                         int column, float2 sum) const {
  const int count = at<Cursor>(shape.cursors)[slot].total;
  const float total = attends ? totals(slot, head)[1] : static_cast<float>(count);
  const float scale = count > 0 ? 1.0f / total : 0.0f;
  char* row = attends ? head_row(slot, head) : memory + shape.means + slot * shape.state_bytes;
  *reinterpret_cast<uint32_t*>(row + 2 * column) = narrow_two<W>(sum.x * scale, sum.y * scale);
}

// Weights x states in shared memory, by tensor cores; the weights of a mean are ones.
template <class W>
__device__ __forceinline__ void Readout<W>::pool(bool attends, bool first) const {
  constexpr uint32_t kOne = std::is_same_v<W, __half> ? 0x3c003c00u : 0x3f803f80u;
  const int lane = lane_index(), num_rows = attends ? heads() : 1;
  const Divider tiles(dim() / 16);
  const int row_tiles = (num_rows + 15) / 16;
#pragma unroll 1
  for (int task = warp_index(); task < own() * row_tiles * tiles.n; task += kWarps) {
    const int rest = tiles.quotient(task), column = 16 * (task - rest * tiles.n);
    const int slot = row_tiles == 1 ? rest : rest / row_tiles;
    const int head = 16 * (rest - slot * row_tiles);
    const int count = at<Cursor>(shape.cursors)[slot].count;
    if (!first && count == 0) continue;
    const uint32_t weights = left_rows(score_row(slot, head), shape.score_bytes, num_rows - head);
    uint32_t from = ptx::shared_address(states(slot) + lane % 16 * shape.state_bytes +
                                        2 * (column + lane / 16 * 8));
    float sum[2][4] = {};
#pragma unroll 2
    for (int k = 0; k < count; k += 16) {
      uint32_t a[4] = {kOne, kOne, kOne, kOne}, b[4];
      if (attends) ptx::load_matrices(a, weights + 2 * k);
      ptx::load_transposed(b, from);
      from += 16 * shape.state_bytes;
      ptx::mma<W>(sum[0], a[0], a[1], a[2], a[3], b[0], b[1]);
      ptx::mma<W>(sum[1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i % 2, r = i / 2, row = head + lane / 4 + 8 * r;
      const int at_column = column + 8 * n + lane % 4 * 2;
      if (row >= num_rows) continue;
      const float2 two{sum[n][2 * r], sum[n][2 * r + 1]};
      if (!shape.chunked) {
        store_pooled(attends, slot, row, at_column, two);
      } else {
        auto* to = reinterpret_cast<float2*>(accumulators(slot, row) + at_column);
        const float factor = attends ? totals(slot, row)[2] : 1.0f;
        *to = first ? two : float2{fmaf(to->x, factor, two.x), fmaf(to->y, factor, two.y)};
      }
    }
  }
  __syncthreads();
}

template <class W>
__device__ __forceinline__ float* Readout<W>::accumulators(int slot, int head) const {
  return at<float>(shape.accumulators) + (slot * shape.most_heads + head) * dim();
}

// All states of the block's requests -> means, or y_h. Ends with a barrier.
template <class W>
__device__ __forceinline__ void Readout<W>::read_states(bool attends,
                                                        uint4 (&raw)[kPartSteps][4]) const {
  for (bool first = true;; first = false) {
    if (!attends || shape.chunked) load_states(first);
    if (attends) {
      score();
      soften(first);
    } else if (first) {
      look_ahead(kMeans, raw);
    }
    pool(attends, first);
    if (!shape.chunked || !more()) break;
  }
  if (!shape.chunked) return;
  const int num_rows = attends ? heads() : 1;
  for (int row = warp_index(); row < own() * num_rows; row += kWarps) {
    const int slot = row / num_rows, head = row - slot * num_rows;
    const float* sum = accumulators(slot, head);
    for (int i = 2 * lane_index(); i < dim(); i += 2 * kWarp)
      store_pooled(attends, slot, head, i, float2{sum[i], sum[i + 1]});
  }
  __syncthreads();
}

}  // namespace sidmlp::cuda::sm90

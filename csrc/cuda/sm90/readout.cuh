// Context readout of a group of requests by a cluster of blocks, on tensor cores.
//
//   1  p, q, r_h, s_h, softmax, y_h, y_h N_h    blocks that share a request: each some heads
//   2  u = LN(q + sum_h y_h N_h)                every block, all requests: the same sums
//      relu(W_1 u + b_1), times its rows of W_2 each block some hidden columns
//   3  ctx = LN(u + sum of those + b_2)         every block, all requests
//
// A cluster barrier lies between. What several blocks need each computes for itself, since a step
// through a barrier takes longer than these steps.
//
// Valid states lie in shared memory as rows of W, whatever their dtype and alignment; a longer
// history comes in chunks, with a running softmax. Left operands of mma: r_h or softmax rows; right
// operand: states. Sums of products with weights are cut into parts of kInnerPart that are added in
// order, so how tasks are shared out never changes a bit; neither do other requests. Rounded to W:
// p, q, r, weights before they are divided by their sum, y, u, hidden columns; fp32: all sums,
// softmax, LayerNorm.
#pragma once

#include <type_traits>

#include "cuda/block_ops.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/matrices.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/readout_shape.h"

namespace sidmlp::cuda::sm90 {

__device__ __forceinline__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// How far the states of a request have been read.
struct Cursor {
  int next;   // token
  int count;  // of the states in shared memory
  int total;  // of those before, too
};

constexpr int kPartSteps = kInnerPart / 16;

// This lane's weights of kInnerPart (or `inner`, if fewer) rows of an input-major matrix.
template <class W>
__device__ __forceinline__ void load_part(const W* from, int64_t stride, int inner,
                                          uint4 (&raw)[kPartSteps][4]) {
#pragma unroll
  for (int s = 0; s < kPartSteps; ++s)
    if (16 * s < inner)
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[s][i] = ptx::load_once(from + (16 * s + i) * stride);
}

// sum[q][2i + r] += x w: column `8g + 2q + i` of row 2t + r. `row`: this lane's inputs.
template <class W>
__device__ __forceinline__ void add_part(const uint4 (&raw)[kPartSteps][4], int inner,
                                         const char* row, float (&sum)[4][4]) {
  float part[4][4] = {};
#pragma unroll
  for (int s = 0; s < kPartSteps; ++s) {
    if (16 * s >= inner) break;
    const uint2 b = *reinterpret_cast<const uint2*>(row + 32 * s);
    const uint32_t words[4][4] = {{raw[s][0].x, raw[s][0].y, raw[s][0].z, raw[s][0].w},
                                  {raw[s][1].x, raw[s][1].y, raw[s][1].z, raw[s][1].w},
                                  {raw[s][2].x, raw[s][2].y, raw[s][2].z, raw[s][2].w},
                                  {raw[s][3].x, raw[s][3].y, raw[s][3].z, raw[s][3].w}};
#pragma unroll
    for (int q = 0; q < 4; ++q)
      ptx::mma<W>(part[q], low_halves(words[0][q], words[1][q]),
                  high_halves(words[0][q], words[1][q]), low_halves(words[2][q], words[3][q]),
                  high_halves(words[2][q], words[3][q]), b.x, b.y);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[q][i] += part[q][i];
}

// Products of a step: rows x weight for each job, summed over `inner`. Offsets are in bytes from
// the readout's memory, steps from a job to the next.
struct WeightProduct {
  const void* weight;  // of W [inner, columns], input-major
  int64_t weight_step, stride;
  int jobs, columns, inner, rows;
  int input, input_step, input_bytes;  // W rows input_bytes apart
  const float* bias;                   // [columns] of each job, or nullptr
  int bias_step;
  bool relu;
  int output, output_step, output_bytes;  // rows of W for the sums; < 0: none
  float* shared;                          // likewise fp32, in every block; nullptr: none
  int shared_step, shared_row;
};

// Quotients of numbers below 2^20 without an integer division.
struct Divider {
  int n;
  float inverse;

  __device__ __forceinline__ explicit Divider(int divisor)
      : n(divisor), inverse(ptx::reciprocal(static_cast<float>(divisor))) {}
  __device__ __forceinline__ int quotient(int x) const {
    return static_cast<int>((static_cast<float>(x) + 0.5f) * inverse);
  }
};

template <class W>
struct Readout {
  const ReadoutView& view;
  const StatesView& source;
  const ReadoutShape& shape;
  char* memory;
  uint32_t block;  // rank in the cluster
  int64_t begin;   // first request of the group
  int requests;    // in the group

  enum Step {
    kMeans,
    kQuery,
    kScoreIn,
    kScoreOut,
    kAttend,
    kValueIn,
    kValueOut,
    kHidden,      // of whole units
    kFfn,         // their part of the result
    kLastHidden,  // of the model's last unit, if it is narrower
    kLastFfn,
    kSteps
  };

  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(memory + offset);
  }
  __device__ __forceinline__ int dim() const { return view.dim; }
  __device__ __forceinline__ int cluster() const { return 1 << shape.cluster_shift; }
  __device__ __forceinline__ int share() const { return 1 << shape.head_shift; }
  __device__ __forceinline__ int share_rank() const {
    return static_cast<int>(block) & (share() - 1);
  }
  __device__ __forceinline__ int first_request() const {
    return (static_cast<int>(block) >> shape.head_shift) * shape.own;
  }
  __device__ __forceinline__ int own() const {
    return min(shape.own, max(requests - first_request(), 0));
  }
  // Head j of this block is the model's head `head_of(j)`.
  __device__ __forceinline__ int heads() const {
    return (view.num_heads - share_rank() + share() - 1) >> shape.head_shift;
  }
  __device__ __forceinline__ int head_of(int j) const {
    return share_rank() + (j << shape.head_shift);
  }
  __device__ __forceinline__ int units() const { return (view.ffn_dim + kUnit - 1) / kUnit; }
  __device__ __forceinline__ char* states(int slot) const {
    return memory + shape.states + slot * shape.chunk * shape.state_bytes;
  }
  __device__ __forceinline__ char* score_row(int slot, int head) const {
    return memory + shape.scores + (slot * shape.most_heads + head) * shape.score_bytes;
  }
  __device__ __forceinline__ char* head_row(int slot, int head) const {
    return memory + shape.head_rows + (slot * shape.most_heads + head) * shape.state_bytes;
  }
  __device__ __forceinline__ WeightProduct* product(int step) const {
    static_assert(sizeof(WeightProduct) <= kProductBytes && kSteps <= kMostProducts, "they fit");
    return reinterpret_cast<WeightProduct*>(memory + shape.products + step * kProductBytes);
  }
  __device__ __forceinline__ float* totals(int slot, int head) const {  // largest, sum, factor
    return at<float>(shape.totals) + 3 * (slot * shape.most_heads + head);
  }

  __device__ __forceinline__ void store_four(char* row, int column, const float4& x) const {
    *reinterpret_cast<uint2*>(row + 2 * column) = {narrow_two<W>(x.x, x.y),
                                                   narrow_two<W>(x.z, x.w)};
  }
  // ---- products with weights ----

  // The tasks of a product: units of columns of each job, and of each part where it is split.
  struct Tasks {
    Divider per_job, whole;
    int num_parts, count;
    bool split;

    __device__ __forceinline__ explicit Tasks(const WeightProduct& p)
        : per_job((p.columns + kUnit - 1) / kUnit), whole(p.jobs * per_job.n) {
      num_parts = (p.inner + kInnerPart - 1) / kInnerPart;
      split = splits(whole.n, p.inner);
      count = whole.n * (split ? num_parts : 1);
    }
  };
  struct Task {
    int job, column, part;  // this lane's first column
    const W* from;
  };
  __device__ __forceinline__ Task task_of(const WeightProduct& p, const Tasks& tasks,
                                          int index) const {
    const int part = tasks.whole.quotient(index), task = index - part * tasks.whole.n;
    const int job = tasks.per_job.quotient(task);
    const int column = (task - job * tasks.per_job.n) * kUnit + lane_index() / 4 * 8;
    const int k = part * kInnerPart + lane_index() % 4 * 4;
    return {job, column, part,
            static_cast<const W*>(p.weight) + job * p.weight_step + k * p.stride +
                (column < p.columns ? column : 0)};
  }

  // Weights of this warp's first task of the next product after `step`: they need not wait for what
  // they are multiplied with.
  __device__ __forceinline__ void look_ahead(int step, uint4 (&raw)[kPartSteps][4]) const {
    do {
      if (++step == kSteps) return;
    } while (step == kAttend || product(step)->jobs == 0);
    const WeightProduct& p = *product(step);
    const Tasks tasks(p);
    if (warp_index() >= tasks.count) return;
    const Task task = task_of(p, tasks, warp_index());
    load_part<W>(task.from, p.stride, p.inner - task.part * kInnerPart, raw);
  }

  // The sums of the step's product, all of its rows and columns; `raw`: as look_ahead left it, for
  // this product before and for the next one after. Ends with a barrier.
  __device__ __forceinline__ void multiply(int step, uint4 (&raw)[kPartSteps][4]) const {
    const WeightProduct& p = *product(step);
    const Tasks tasks(p);
    const int g = lane_index() / 4, t = lane_index() % 4, num_parts = tasks.num_parts;
    const bool split = tasks.split;
    float* parts = at<float>(shape.parts);
#pragma unroll 1
    for (int index = warp_index(); index < tasks.count; index += kWarps) {
      const Task task = task_of(p, tasks, index);
      const int job = task.job, column = task.column;
      const char* row =
          memory + p.input + job * p.input_step + min(g, p.rows - 1) * p.input_bytes + 8 * t;
      const int end = split ? task.part + 1 : num_parts;
      const W* from = task.from;
      float sum[4][4] = {};
#pragma unroll 1
      for (int part = task.part; part < end; ++part) {
        const int k = part * kInnerPart;
        if (index != warp_index() || part != task.part)
          load_part<W>(from, p.stride, p.inner - k, raw);
        from += kInnerPart * p.stride;
        add_part<W>(raw, p.inner - k, row + 2 * k, sum);
      }
      if (column >= p.columns) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int request = 2 * t + i / 2, half = i % 2;
        if (request >= p.rows) continue;
        const float4 four{sum[2 * half][i / 2], sum[2 * half][2 + i / 2], sum[2 * half + 1][i / 2],
                          sum[2 * half + 1][2 + i / 2]};
        if (split) {
          *reinterpret_cast<float4*>(parts +
                                     ((task.part * p.jobs + job) * p.rows + request) * p.columns +
                                     column + 4 * half) = four;
        } else {
          finish(p, job, request, column + 4 * half, four, bias_of(p, job, column + 4 * half), 0,
                 cluster());
        }
      }
    }
    look_ahead(step, raw);
    if (!split) {
      __syncthreads();
      return;
    }
    // A thread for each four sums and each block that they go to.
    const Divider quads(p.columns / 4), rows(p.rows);
    const int step_quads = p.jobs * p.rows * quads.n;
    const int shift = p.shared != nullptr ? shape.cluster_shift : 0;
    bool waits = true;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x);; i += kThreads) {
      const bool inside = i < step_quads << shift;
      const int quad = inside ? i >> shift : 0, to = i & ((1 << shift) - 1);
      const int row = quads.quotient(quad), job = rows.quotient(row);
      const int column = 4 * (quad - row * quads.n);
      const float4 bias = bias_of(p, job, column);
      if (waits) __syncthreads();  // all threads, the first time
      waits = false;
      if (!inside) break;
      const float4* from = reinterpret_cast<const float4*>(parts) + quad;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int part = 0; part < num_parts; ++part) add_four(from[part * step_quads], sum);
      finish(p, job, row - job * p.rows, column, sum, bias, to, to + 1);
    }
    __syncthreads();
  }

  __device__ __forceinline__ float4 bias_of(const WeightProduct& p, int job, int column) const {
    if (p.bias == nullptr) return {0.0f, 0.0f, 0.0f, 0.0f};
    return __ldg(reinterpret_cast<const float4*>(p.bias + job * p.bias_step + column));
  }

  // Four sums of a product -> the arrays that it names, in blocks `begin_block` .. of the cluster.
  __device__ __forceinline__ void finish(const WeightProduct& p, int job, int row, int column,
                                         float4 x, const float4& bias, int begin_block,
                                         int end_block) const {
    add_four(bias, x);
    if (p.relu)  // fmaxf would drop a NaN, which must reach the context
      x = {x.x < 0.0f ? 0.0f : x.x, x.y < 0.0f ? 0.0f : x.y, x.z < 0.0f ? 0.0f : x.z,
           x.w < 0.0f ? 0.0f : x.w};
    if (p.output >= 0 && begin_block == 0)
      store_four(memory + p.output + job * p.output_step + row * p.output_bytes, column, x);
    if (p.shared == nullptr) return;
    const uint32_t place =
        ptx::shared_address(p.shared + job * p.shared_step + row * p.shared_row + column);
#pragma unroll 1
    for (int to = begin_block; to < end_block; ++to)
      ptx::store_peer(ptx::peer_of(place, static_cast<uint32_t>(to)), x);
  }

  // ---- states ----

  // The next states of `slot` -> their tokens, by a warp.
  __device__ __forceinline__ void collect(int slot, bool restart) const {
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
  __device__ __forceinline__ uint4 eight(int64_t from, bool aligned) const {
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
  __device__ __forceinline__ void load_states(bool restart) const {
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

  __device__ __forceinline__ bool more() const {
    bool found = false;
    for (int slot = 0; slot < own(); ++slot)
      found |= at<Cursor>(shape.cursors)[slot].next < source.tokens;
    return found;
  }

  // ---- attention ----

  // This lane's row of 16, for load_matrices; rows past the last are read as the last.
  __device__ __forceinline__ uint32_t left_rows(const char* rows, int bytes, int count) const {
    const int lane = lane_index();
    return ptx::shared_address(rows + min(lane % 16, count - 1) * bytes + lane / 16 * 16);
  }

  // r_h x_t of the states in shared memory.
  __device__ __forceinline__ void score() const {
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
  __device__ __forceinline__ void soften(bool first) const {
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
  static __device__ __forceinline__ W narrow(float x) {
    if constexpr (std::is_same_v<W, __half>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  }

  // Two columns of sums over states -> where they go: means (no heads), or y_h in the place of r_h.
  __device__ __forceinline__ void store_pooled(bool attends, int slot, int head, int column,
                                               float2 sum) const {
    const int count = at<Cursor>(shape.cursors)[slot].total;
    const float total = attends ? totals(slot, head)[1] : static_cast<float>(count);
    const float scale = count > 0 ? 1.0f / total : 0.0f;
    char* row = attends ? head_row(slot, head) : memory + shape.means + slot * shape.state_bytes;
    *reinterpret_cast<uint32_t*>(row + 2 * column) = narrow_two<W>(sum.x * scale, sum.y * scale);
  }

  // Weights x states in shared memory, by tensor cores; the weights of a mean are ones.
  __device__ __forceinline__ void pool(bool attends, bool first) const {
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
  __device__ __forceinline__ float* accumulators(int slot, int head) const {
    return at<float>(shape.accumulators) + (slot * shape.most_heads + head) * dim();
  }

  // All states of the block's requests -> means, or y_h. Ends with a barrier.
  __device__ __forceinline__ void read_states(bool attends, uint4 (&raw)[kPartSteps][4]) const {
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

  // ---- the steps ----

  // What a step multiplies; no jobs: nothing.
  __device__ __forceinline__ WeightProduct product_of(int step) const {
    const int pad = dim(), row = shape.state_bytes, head_rows = shape.most_heads * row;
    const int head_dim = view.head_dim, folded_rows = shape.most_heads * shape.folded_bytes;
    const int64_t share_step = int64_t{1} << shape.head_shift, square = int64_t{pad} * pad;
    const int64_t folded = int64_t{head_dim} * pad;
    const bool factored = view.score_in != nullptr;
    WeightProduct p{};
    p.output = -1;
    p.rows = own();
    p.jobs = heads();
    p.columns = p.inner = pad;
    p.stride = pad;
    if (step >= kHidden) {
      // Units of hidden columns are the jobs; those of this block are `cluster` apart.
      const int whole = view.ffn_dim / kUnit, rank = static_cast<int>(block);
      const int mine = (whole - rank + cluster() - 1) >> shape.cluster_shift;
      const bool last = step >= kLastHidden;
      const int first = last ? mine : 0, unit = rank + (first << shape.cluster_shift);
      const int width = last ? view.ffn_dim - whole * kUnit : kUnit;
      const int place = shape.hidden + 2 * kUnit * first;
      p.rows = requests;
      p.jobs = !last ? mine : unit == whole && width > 0 ? 1 : 0;
      if (step == kHidden || step == kLastHidden) {
        p.weight = static_cast<const W*>(view.ffn_in) + unit * kUnit;
        p.weight_step = static_cast<int64_t>(kUnit) << shape.cluster_shift;
        p.stride = view.ffn_dim;
        p.columns = width;
        p.input = shape.inputs, p.input_bytes = row;
        p.bias = view.ffn_in_bias + unit * kUnit, p.bias_step = kUnit << shape.cluster_shift;
        p.relu = true;
        p.output = place, p.output_step = 2 * kUnit, p.output_bytes = shape.hidden_bytes;
      } else {
        p.weight = static_cast<const W*>(view.ffn_out) + static_cast<int64_t>(unit) * kUnit * pad;
        p.weight_step = static_cast<int64_t>(kUnit * pad) << shape.cluster_shift;
        p.inner = width;
        p.input = place, p.input_step = 2 * kUnit, p.input_bytes = shape.hidden_bytes;
        p.shared = at<float>(shape.ffn_sums) + unit * pad;
        p.shared_step = pad << shape.cluster_shift, p.shared_row = units() * pad;
      }
      return p;
    }
    if (step == kQuery) {
      p.weight = view.query_weight;
      p.jobs = 1;
      p.input = shape.means, p.input_bytes = row;
      p.bias = view.vectors;
      p.output = shape.query_rows, p.output_bytes = row;
      if (share_rank() == 0) p.shared = at<float>(shape.queries) + first_request() * pad;
      p.shared_row = pad;
    } else if (step == kScoreIn || step == kValueIn) {
      const bool score = step == kScoreIn;
      if (!factored) p.jobs = 0;
      p.weight =
          static_cast<const W*>(score ? view.score_in : view.value_in) + share_rank() * head_dim;
      p.weight_step = share_step * head_dim;
      p.stride = view.num_heads * head_dim;
      p.columns = head_dim;
      p.input = score ? shape.query_rows : shape.head_rows;
      p.input_step = score ? 0 : row, p.input_bytes = score ? row : head_rows;
      p.output = shape.folded, p.output_step = shape.folded_bytes, p.output_bytes = folded_rows;
    } else {
      const bool score = step == kScoreOut;
      if (factored) {
        p.weight =
            static_cast<const W*>(score ? view.score_out : view.value_out) + share_rank() * folded;
        p.weight_step = share_step * folded;
        p.inner = head_dim;
        p.input = shape.folded, p.input_step = shape.folded_bytes, p.input_bytes = folded_rows;
      } else if (score) {
        p.weight = static_cast<const W*>(view.score_out) + share_rank() * pad;
        p.weight_step = share_step * pad;
        p.stride = static_cast<int64_t>(view.num_heads) * pad;
        p.input = shape.query_rows, p.input_bytes = row;
      } else {
        p.weight = static_cast<const W*>(view.value_in) + share_rank() * square;
        p.weight_step = share_step * square;
        p.input = shape.head_rows, p.input_step = row, p.input_bytes = head_rows;
      }
      if (score) {
        p.output = shape.head_rows, p.output_step = row, p.output_bytes = head_rows;
      } else {
        p.shared =
            at<float>(shape.attended) + (first_request() * view.num_heads + share_rank()) * pad;
        p.shared_step = pad << shape.head_shift, p.shared_row = view.num_heads * pad;
      }
    }
    return p;
  }

  // u <- LN(q + the heads' parts of the attention), or context <- LN(u + b_2 + the units' parts of
  // the FFN), after a barrier of the cluster: a warp for each request of the group. Ends with a
  // barrier of the block.
  __device__ __forceinline__ void add_and_norm(bool context, char* rows, int bytes,
                                               float* out) const {
    const int pad = dim(), count = context ? units() : view.num_heads, at_lane = 4 * lane_index();
    const float* x = at<float>(context ? shape.residuals : shape.queries);
    const float* sums = at<float>(context ? shape.ffn_sums : shape.attended);
    const float* vectors = view.vectors + (context ? 4 : 1) * pad;  // gain, then shift
    auto vector = [&](const float* from, int i) {
      return __ldg(reinterpret_cast<const float4*>(from + min(i, pad - 4)));
    };
    const float4 first_gain = vector(vectors, at_lane),
                 first_shift = vector(vectors + pad, at_lane);
    const float4 first_bias = vector(view.vectors + 3 * pad, at_lane);
    cluster_barrier();  // with those on their way
    for (int request = warp_index(); request < requests; request += kWarps) {
      float* u = at<float>(shape.residuals) + request * pad;
      const float* from = sums + request * count * pad;
      float total = 0.0f, squares = 0.0f;
#pragma unroll 1
      for (int i = at_lane; i < pad; i += 4 * kWarp) {
        float4 sum = *reinterpret_cast<const float4*>(from + i);
#pragma unroll 4
        for (int j = 1; j < count; ++j)
          add_four(*reinterpret_cast<const float4*>(from + j * pad + i), sum);
        if (context) add_four(i == at_lane ? first_bias : vector(view.vectors + 3 * pad, i), sum);
        add_four(*reinterpret_cast<const float4*>(x + request * pad + i), sum);
        *reinterpret_cast<float4*>(u + i) = sum;
        total += (sum.x + sum.y) + (sum.z + sum.w);
      }
      const float mean = warp_sum(total) / static_cast<float>(pad);
#pragma unroll 1
      for (int i = at_lane; i < pad; i += 4 * kWarp) {
        const float4 sum = *reinterpret_cast<const float4*>(u + i);
        const float4 off{sum.x - mean, sum.y - mean, sum.z - mean, sum.w - mean};
        squares = dot_four(off, off, squares);
      }
      const float variance = warp_sum(squares) / static_cast<float>(pad);
      const float scale = 1.0f / sqrtf(variance + view.layer_norm_eps);
      const bool stored = out != nullptr && (request & (cluster() - 1)) == static_cast<int>(block);
#pragma unroll 1
      for (int i = at_lane; i < pad; i += 4 * kWarp) {
        const float4 sum = *reinterpret_cast<const float4*>(u + i);
        const float4 gain = i == at_lane ? first_gain : vector(vectors, i);
        const float4 shift = i == at_lane ? first_shift : vector(vectors + pad, i);
        const float4 four{fmaf((sum.x - mean) * scale, gain.x, shift.x),
                          fmaf((sum.y - mean) * scale, gain.y, shift.y),
                          fmaf((sum.z - mean) * scale, gain.z, shift.z),
                          fmaf((sum.w - mean) * scale, gain.w, shift.w)};
        *reinterpret_cast<float4*>(u + i) = four;
        if (rows != nullptr) store_four(rows + request * bytes, i, four);
        if (stored) *reinterpret_cast<float4*>(out + (begin + request) * pad + i) = four;
      }
    }
    __syncthreads();
  }

  // Contexts of the group, as rows of W in this block's shared memory and, unless `out` is null,
  // as fp32 there, [batch, D]. The caller has arrived at the cluster's barrier. Ends with a barrier
  // of the block.
  __device__ __forceinline__ void run(char* contexts, int context_bytes, float* out) const {
    const bool reads = own() > 0 && share_rank() < view.num_heads;
    // Warps that do not look for valid states say what the steps multiply.
    constexpr int kPlanners = kWarps - kReadStates;
    for (int step = kWarps - 1 - warp_index(); step < kSteps && warp_index() >= kReadStates;
         step += kPlanners) {
      if (step == kMeans || step == kAttend) continue;
      const WeightProduct p = product_of(step);
      if (lane_index() == 0) *product(step) = p;
    }
    uint4 raw[kPartSteps][4];
    if (!reads) {
      __syncthreads();
      look_ahead(kValueOut, raw);
    }
#pragma unroll 1
    for (int step = kMeans; step < kSteps; ++step) {
      if (step == kQuery) ptx::cluster_wait();  // for all to have begun
      if (step == kHidden) add_and_norm(false, memory + shape.inputs, shape.state_bytes, nullptr);
      if (step < kHidden && !reads) continue;
      if (step == kMeans || step == kAttend) {
        read_states(step == kAttend, raw);
      } else if (product(step)->jobs > 0) {
        multiply(step, raw);
      }
    }
    add_and_norm(true, contexts, context_bytes, out);
  }
};

}  // namespace sidmlp::cuda::sm90

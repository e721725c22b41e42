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

#include "cuda/block_ops.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/readout_group.cuh"
#include "cuda/sm90/readout_products.cuh"
#include "cuda/sm90/readout_states.cuh"

namespace sidmlp::cuda::sm90 {

__device__ __forceinline__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// What a step multiplies; no jobs: nothing.
template <class W>
__device__ __forceinline__ WeightProduct Readout<W>::product_of(int step) const {
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
template <class W>
__device__ __forceinline__ void Readout<W>::add_and_norm(bool context, char* rows, int bytes,
                                                         float* out) const {
  const int pad = dim(), count = context ? units() : view.num_heads, at_lane = 4 * lane_index();
  const float* x = at<float>(context ? shape.residuals : shape.queries);
  const float* sums = at<float>(context ? shape.ffn_sums : shape.attended);
  const float* vectors = view.vectors + (context ? 4 : 1) * pad;  // gain, then shift
  auto vector = [&](const float* from, int i) {
    return __ldg(reinterpret_cast<const float4*>(from + min(i, pad - 4)));
  };
  const float4 first_gain = vector(vectors, at_lane), first_shift = vector(vectors + pad, at_lane);
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
      if (rows != nullptr) store_four<W>(rows + request * bytes, i, four);
      if (stored) *reinterpret_cast<float4*>(out + (begin + request) * pad + i) = four;
    }
  }
  __syncthreads();
}

// Contexts of the group, as rows of W in this block's shared memory and, unless `out` is null,
// as fp32 there, [batch, D]. The caller has arrived at the cluster's barrier. Ends with a barrier
// of the block.
template <class W>
__device__ __forceinline__ void Readout<W>::run(char* contexts, int context_bytes,
                                                float* out) const {
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

}  // namespace sidmlp::cuda::sm90

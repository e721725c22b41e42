// Context readout: products of rows with weights on tensor cores. A warp takes a unit of columns of
// all requests, so weights are read once.
#pragma once

#include "cuda/block_ops.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/matrices.cuh"
#include "cuda/sm90/readout_group.cuh"

namespace sidmlp::cuda::sm90 {

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

template <class W>
__device__ __forceinline__ typename Readout<W>::Task Readout<W>::task_of(const WeightProduct& p,
                                                                         const Tasks& tasks,
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
template <class W>
__device__ __forceinline__ void Readout<W>::look_ahead(int step,
                                                       uint4 (&raw)[kPartSteps][4]) const {
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
template <class W>
__device__ __forceinline__ void Readout<W>::multiply(int step, uint4 (&raw)[kPartSteps][4]) const {
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

template <class W>
__device__ __forceinline__ float4 Readout<W>::bias_of(const WeightProduct& p, int job,
                                                      int column) const {
  if (p.bias == nullptr) return {0.0f, 0.0f, 0.0f, 0.0f};
  return __ldg(reinterpret_cast<const float4*>(p.bias + job * p.bias_step + column));
}

// Four sums of a product -> the arrays that it names, in blocks `begin_block` .. of the cluster.
template <class W>
__device__ __forceinline__ void Readout<W>::finish(const WeightProduct& p, int job, int row,
                                                   int column, float4 x, const float4& bias,
                                                   int begin_block, int end_block) const {
  add_four(bias, x);
  if (p.relu)  // fmaxf would drop a NaN, which must reach the context
    x = {x.x < 0.0f ? 0.0f : x.x, x.y < 0.0f ? 0.0f : x.y, x.z < 0.0f ? 0.0f : x.z,
         x.w < 0.0f ? 0.0f : x.w};
  if (p.output >= 0 && begin_block == 0)
    store_four<W>(memory + p.output + job * p.output_step + row * p.output_bytes, column, x);
  if (p.shared == nullptr) return;
  const uint32_t place =
      ptx::shared_address(p.shared + job * p.shared_step + row * p.shared_row + column);
#pragma unroll 1
  for (int to = begin_block; to < end_block; ++to)
    ptx::store_peer(ptx::peer_of(place, static_cast<uint32_t>(to)), x);
}

}  // namespace sidmlp::cuda::sm90

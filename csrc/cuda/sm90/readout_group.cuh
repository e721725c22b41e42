// Context readout: what a block has of its group of requests, the places in its shared memory, and
// what a step multiplies with weights. readout.cuh has the steps, readout_products.cuh the products
// with weights, readout_states.cuh what reads states.
#pragma once

#include "cuda/block_ops.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/readout_shape.h"

namespace sidmlp::cuda::sm90 {

// How far the states of a request have been read.
struct Cursor {
  int next;   // token
  int count;  // of the states in shared memory
  int total;  // of those before, too
};

constexpr int kPartSteps = kInnerPart / 16;

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

  // ---- readout_products.cuh ----

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
  __device__ Task task_of(const WeightProduct& p, const Tasks& tasks, int index) const;
  __device__ void look_ahead(int step, uint4 (&raw)[kPartSteps][4]) const;
  __device__ void multiply(int step, uint4 (&raw)[kPartSteps][4]) const;
  __device__ float4 bias_of(const WeightProduct& p, int job, int column) const;
  __device__ void finish(const WeightProduct& p, int job, int row, int column, float4 x,
                         const float4& bias, int begin_block, int end_block) const;

  // ---- readout_states.cuh ----
  __device__ void collect(int slot, bool restart) const;
  __device__ uint4 eight(int64_t from, bool aligned) const;
  __device__ void load_states(bool restart) const;
  __device__ bool more() const;
  __device__ uint32_t left_rows(const char* rows, int bytes, int count) const;
  __device__ void score() const;
  __device__ void soften(bool first) const;
  static __device__ W narrow(float x);
  __device__ void store_pooled(bool attends, int slot, int head, int column, float2 sum) const;
  __device__ void pool(bool attends, bool first) const;
  __device__ float* accumulators(int slot, int head) const;
  __device__ void read_states(bool attends, uint4 (&raw)[kPartSteps][4]) const;

  // ---- readout.cuh ----
  __device__ WeightProduct product_of(int step) const;
  __device__ void add_and_norm(bool context, char* rows, int bytes, float* out) const;
  __device__ void run(char* contexts, int context_bytes, float* out) const;
};

// Four columns as W.
template <class W>
__device__ __forceinline__ void store_four(char* row, int column, const float4& x) {
  *reinterpret_cast<uint2*>(row + 2 * column) = {narrow_two<W>(x.x, x.y), narrow_two<W>(x.z, x.w)};
}

}  // namespace sidmlp::cuda::sm90

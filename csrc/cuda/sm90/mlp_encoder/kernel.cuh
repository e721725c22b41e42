// SID-MLP++'s encoder in one launch.
//
// A cluster of blocks, or a block alone, carries a group of requests through all layers. Tokens of
// one role share their weights, so a block gathers the rows of a role and multiplies them together;
// the blocks of a cluster take different roles. The residual x stays in fp32 in the block's
// workspace (the second-level cache); nobody else reads it, but for the sums that the means are
// made of:
//
//   x = embedding + position
//   per layer:  sums of x by request and role -> means (all blocks: one barrier)
//               per role: hidden of the means, once per request, then
//                 per chunk of rows: Linear, LayerNorm, GELU, Linear, x +=
//   states = LayerNorm(x)
//
// A row's bits depend on its request alone: products are row by row, and a request's sum is cut by
// role and then by eights, whatever the group and the cluster.
#pragma once

#include "cuda/sm90/mlp_encoder/group.cuh"
#include "cuda/sm90/mlp_encoder/products.cuh"

namespace sidmlp::cuda::sm90 {

extern __shared__ __align__(128) char mlp_memory[];

template <class W>
struct MlpEncoder {
  using N = Numbers<W>;

  // All in shared memory, or every thread would keep it in registers.
  static __device__ __forceinline__ MlpState& state() {
    return *reinterpret_cast<MlpState*>(mlp_memory);
  }
  static __device__ __forceinline__ const EncodeMlpProblem& problem() { return state().problem; }
  static __device__ __forceinline__ const MlpShape& shape() { return state().shape; }
  static __device__ __forceinline__ const MlpView& model() { return state().problem.model; }
  static __device__ __forceinline__ char* memory() { return mlp_memory + kMlpStateBytes; }

  static __device__ __forceinline__ float* x_rows() {
    float* x = state().x;
    __builtin_assume(__isGlobal(x));
    return x;
  }
  static __device__ __forceinline__ const MlpPlace* places() {
    const MlpPlace* places = state().places;
    __builtin_assume(__isGlobal(places));
    return places;
  }
  static __device__ __forceinline__ MlpRows rows_at(int offset, int bytes) {
    return {ptx::shared_address(memory()) + static_cast<uint32_t>(offset), bytes};
  }

  static __device__ __forceinline__ void embed() {
    constexpr int kTogether = 4;  // tokens of a thread whose loads go out together
    const int pieces = shape().dim_pad / 8, count = state().own_rows * pieces;
    const TokensView& tokens = problem().tokens;
    for (int from = threadIdx.x; from < count; from += kTogether * kMlpThreads) {
      MlpPlace place[kTogether];
      int64_t id[kTogether];
      float a[kTogether][8], b[kTogether][8];
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
        place[n] = places()[min(from + n * kMlpThreads, count - 1) / pieces];
#pragma unroll
      for (int n = 0; n < kTogether; ++n)
        id[n] = __ldg(tokens.ids + (state().first + place[n].request) * tokens.tokens +
                      place[n].position);
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int piece = min(from + n * kMlpThreads, count - 1) % pieces;
        if (id[n] < 0 || id[n] >= model().vocab_size) id[n] = -1;
        N::load(static_cast<const W*>(model().embedding) +
                    max(id[n], int64_t{0}) * shape().dim_pad + 8 * piece,
                a[n]);
        N::load(static_cast<const W*>(model().positions) +
                    static_cast<int64_t>(place[n].position) * shape().dim_pad + 8 * piece,
                b[n]);
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int i = from + n * kMlpThreads;
        if (i >= count) break;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          a[n][j] = id[n] < 0 ? __int_as_float(0x7fffffff) : a[n][j] + b[n][j];
        auto* to = reinterpret_cast<float4*>(x_rows()) + 2 * static_cast<int64_t>(i);
        to[0] = {a[n][0], a[n][1], a[n][2], a[n][3]};
        to[1] = {a[n][4], a[n][5], a[n][6], a[n][7]};
      }
    }
  }

  // Sums of each request over the rows of this block's roles, eight lanes a sum.
  static __device__ __forceinline__ void add_up(float4* to) {
    const int quads = shape().dim_pad / 4, roles = model().num_roles;
    const int own = (roles - state().rank + shape().cluster - 1) / shape().cluster;
    const int count = state().requests * own * quads * 8;  // a multiple of 32
    for (int i = threadIdx.x; i < count; i += kMlpThreads) {
      const int part = i % 8, quad = i / 8 % quads, rest = i / 8 / quads;
      const int role = state().rank + rest % own * shape().cluster, request = rest / own;
      const int rows = state().counts[request][role];
      const auto* from =
          reinterpret_cast<const float4*>(x_rows()) +
          static_cast<int64_t>(state().base[role] + state().starts[request][role]) * quads + quad;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
      for (int row = part; row < rows; row += 8) {
        const float4 more = from[static_cast<int64_t>(row) * quads];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
      }
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        sum.x += __shfl_xor_sync(kAllLanes, sum.x, distance);
        sum.y += __shfl_xor_sync(kAllLanes, sum.y, distance);
        sum.z += __shfl_xor_sync(kAllLanes, sum.z, distance);
        sum.w += __shfl_xor_sync(kAllLanes, sum.w, distance);
      }
      if (part == 0) __stcg(to + (request * roles + role) * quads + quad, sum);
    }
  }

  // Means of all requests into a tile of rows, zeros where there is none.
  static __device__ __forceinline__ void form_means(const float4* from) {
    const int pieces = shape().dim_pad / 8, roles = model().num_roles;
    for (int i = threadIdx.x; i < kMlpTileRows * pieces; i += kMlpThreads) {
      const int request = i / pieces, piece = i % pieces;
      float mean[8] = {};
      if (request < state().requests) {
#pragma unroll 4
        for (int role = 0; role < roles; ++role) {
          const float4* at = from + (request * roles + role) * 2 * pieces + 2 * piece;
          const float4 a = __ldcg(at), b = __ldcg(at + 1);
          mean[0] += a.x, mean[1] += a.y, mean[2] += a.z, mean[3] += a.w;
          mean[4] += b.x, mean[5] += b.y, mean[6] += b.z, mean[7] += b.w;
        }
        const float share = 1.0f / static_cast<float>(max(state().valid[request], 1));
#pragma unroll
        for (int j = 0; j < 8; ++j) mean[j] *= share;
      }
      N::store(rows_at(shape().means, shape().x_bytes).address +
                   static_cast<uint32_t>(request * shape().x_bytes + 8 * piece * sizeof(W)),
               mean);
    }
  }

  // Rows [begin, begin + rows) of this block, rounded, zeros up to a whole tile; gain and shift of
  // the hidden LayerNorm. Loads of a thread go out together.
  static __device__ __forceinline__ void gather(int begin, int rows, int tiles,
                                                const float* vectors) {
    constexpr int kTogether = 3;
    const int pieces = shape().dim_pad / 8, count = kMlpTileRows * tiles * pieces;
    const int hidden_pad = shape().hidden_pad;
    const auto* norm_from = reinterpret_cast<const float4*>(vectors + hidden_pad);
    auto* norm = reinterpret_cast<float4*>(memory() + shape().vectors);
    const int own = static_cast<int>(threadIdx.x);
    const float4 first_norm = __ldg(norm_from + min(own, hidden_pad / 2 - 1));
    const int request = places()[begin + min(own, rows - 1)].request;
    const auto* x =
        reinterpret_cast<const float4*>(x_rows() + static_cast<int64_t>(begin) * shape().dim_pad);
    for (int from = own; from < count; from += kTogether * kMlpThreads) {
      float4 low[kTogether] = {}, high[kTogether] = {};
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int i = from + n * kMlpThreads;
        if (i < rows * pieces) low[n] = x[2 * i], high[n] = x[2 * i + 1];
      }
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
        const int i = from + n * kMlpThreads;
        if (i >= count) break;
        const int row = i / pieces, piece = i % pieces;
        const float value[8] = {low[n].x,  low[n].y,  low[n].z,  low[n].w,
                                high[n].x, high[n].y, high[n].z, high[n].w};
        N::store(rows_at(shape().x, 0).address +
                     static_cast<uint32_t>(row * shape().x_bytes +
                                           8 * piece * static_cast<int>(sizeof(W))),
                 value);
      }
    }
    if (own < hidden_pad / 2) norm[own] = first_norm;
    if (own < kMlpTileRows * tiles) state().request_of[own] = request;
#pragma unroll 1
    for (int i = own + kMlpThreads; i < hidden_pad / 2; i += kMlpThreads)
      norm[i] = __ldg(norm_from + i);
  }

  // hidden <- GELU(LayerNorm(hidden)), in units of N::kUnit; sixteen lanes a row, each with every
  // sixteenth piece of eight. The first pieces stay in registers, others are read again.
  static __device__ __forceinline__ void normalise(int rows) {
    constexpr int kHeld = 4;
    const int lane = lane_index(), own = lane % 16, width = model().hidden_dim;
    const int pieces = shape().hidden_pad / 8, hidden_bytes = shape().hidden_bytes;
    const uint32_t hidden = rows_at(shape().hidden, 0).address;
    const auto* gain = reinterpret_cast<const float4*>(memory() + shape().vectors);
    const float4* shift = gain + shape().hidden_pad / 4;
    const float share = 1.0f / static_cast<float>(width), eps = model().eps;
    auto sum_of = [&](float value) {
#pragma unroll
      for (int distance = 1; distance < 16; distance *= 2)
        value += __shfl_xor_sync(kAllLanes, value, distance);
      return value;
    };
    auto add_squares = [&](const float (&value)[8], int piece, float mean, float& squares) {
      if (8 * piece + 8 <= width) {
#pragma unroll
        for (int j = 0; j < 8; ++j) squares = fmaf(value[j] - mean, value[j] - mean, squares);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (8 * piece + j < width) squares = fmaf(value[j] - mean, value[j] - mean, squares);
      }
    };
    auto finish_piece = [&](float (&value)[8], uint32_t to, int piece, float mean, float scale) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 g = gain[2 * piece + half], s = shift[2 * piece + half];
        float* v = value + 4 * half;
        v[0] = N::activate(fmaf((v[0] - mean) * scale, g.x, s.x));
        v[1] = N::activate(fmaf((v[1] - mean) * scale, g.y, s.y));
        v[2] = N::activate(fmaf((v[2] - mean) * scale, g.z, s.z));
        v[3] = N::activate(fmaf((v[3] - mean) * scale, g.w, s.w));
      }
      N::store(to, value);
    };
    for (int pair = warp_index(); 2 * pair < rows; pair += kMlpWarps) {
      const int row = 2 * pair + lane / 16;  // the last one may be nobody's
      const uint32_t at = hidden + static_cast<uint32_t>(row * hidden_bytes);
      auto place = [&](int piece) {
        return at + static_cast<uint32_t>(8 * piece * static_cast<int>(sizeof(W)));
      };
      float held[kHeld][8] = {}, more[8] = {}, sum = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (own + 16 * i < pieces) N::load(place(own + 16 * i), held[i]);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (own + 16 * i < pieces) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sum += held[i][j];  // paddings are 0
        }
      }
      for (int piece = own + 16 * kHeld; piece < pieces; piece += 16) {
        N::load(place(piece), more);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += more[j];
      }
      const float mean = sum_of(sum) * share;
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (own + 16 * i < pieces) add_squares(held[i], own + 16 * i, mean, squares);
      for (int piece = own + 16 * kHeld; piece < pieces; piece += 16) {
        N::load(place(piece), more);
        add_squares(more, piece, mean, squares);
      }
      const float scale = rsqrtf(fmaf(sum_of(squares), share, eps));
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int piece = own + 16 * i;
        if (piece < pieces) finish_piece(held[i], place(piece), piece, mean, scale);
      }
      for (int piece = own + 16 * kHeld; piece < pieces; piece += 16) {
        N::load(place(piece), more);
        finish_piece(more, place(piece), piece, mean, scale);
      }
    }
  }

  // One chunk of a role's rows, [begin, begin + rows) of this block, through a layer.
  static __device__ void pass(const MlpLayerView& layer, int role, int begin, int rows,
                              bool is_first) {
    const int dim_pad = shape().dim_pad, hidden_pad = shape().hidden_pad;
    const int64_t matrix = static_cast<int64_t>(dim_pad) * hidden_pad;
    const float* vectors = layer.vectors + static_cast<int64_t>(role) * 3 * hidden_pad;
    const int tiles = (rows + kMlpTileRows - 1) / kMlpTileRows;
    auto* mean_hidden = reinterpret_cast<float*>(memory() + shape().mean_hidden);
    const MlpRows hidden = rows_at(shape().hidden, shape().hidden_bytes);
    gather(begin, rows, tiles, vectors);
    if (is_first) {
      product<W, 2>(
          rows_at(shape().means, shape().x_bytes), 1, dim_pad,
          static_cast<const W*>(layer.mean) + role * matrix, hidden_pad / 16,
          [&](int, int column) { return __ldg(reinterpret_cast<const float2*>(vectors + column)); },
          [&](int request, int column, float low, float high) {
            if (request < state().requests)
              *reinterpret_cast<float2*>(mean_hidden + request * hidden_pad + column) = {low, high};
          });
    }
    __syncthreads();
    product<W, 2>(
        rows_at(shape().x, shape().x_bytes), tiles, dim_pad,
        static_cast<const W*>(layer.token) + role * matrix, hidden_pad / 16,
        [&](int row, int column) {
          return *reinterpret_cast<const float2*>(mean_hidden +
                                                  state().request_of[row] * hidden_pad + column);
        },
        [&](int row, int column, float low, float high) {
          N::store_two(hidden.address + static_cast<uint32_t>(row * hidden.bytes +
                                                              column * static_cast<int>(sizeof(W))),
                       low, high);
        });
    __syncthreads();
    // The last bias, by the warps with the fewest rows; nobody reads that of the pass before.
    auto* bias = reinterpret_cast<float*>(memory() + shape().vectors) + 2 * hidden_pad;
#pragma unroll 1
    for (int i = kMlpThreads - 1 - static_cast<int>(threadIdx.x); i < dim_pad; i += kMlpThreads)
      bias[i] = __ldg(layer.bias + role * dim_pad + i);
    normalise(rows);
    __syncthreads();
    float* x = x_rows() + static_cast<int64_t>(begin) * dim_pad;
    constexpr float kInUnits = 1.0f / N::kUnit;  // a power of two: nothing is rounded
    product<W, 1>(
        hidden, tiles, hidden_pad, static_cast<const W*>(layer.out) + role * matrix, dim_pad / 16,
        [&](int row, int column) {
          const float2 more = *reinterpret_cast<const float2*>(bias + column);
          const float2 before = *reinterpret_cast<const float2*>(
              x + static_cast<int64_t>(min(row, rows - 1)) * dim_pad + column);  // no branch
          return float2{kInUnits * (before.x + more.x), kInUnits * (before.y + more.y)};
        },
        [&](int row, int column, float low, float high) {
          if (row < rows)
            *reinterpret_cast<float2*>(x + static_cast<int64_t>(row) * dim_pad + column) = {
                N::kUnit * low, N::kUnit * high};
        });
  }

  // states <- LayerNorm(x), eight lanes a row.
  static __device__ __forceinline__ void finish() {
    const int lane = lane_index(), own = lane % 8, dim = model().dim, quads = shape().dim_pad / 4;
    const float scale_of_sum = 1.0f / static_cast<float>(dim);
    auto* states = static_cast<W*>(problem().states);
    auto sum_of = [&](float value) {
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2)
        value += __shfl_xor_sync(kAllLanes, value, distance);
      return value;
    };
    for (int four = warp_index(); 4 * four < state().own_rows; four += kMlpWarps) {
      const bool real = 4 * four + lane / 8 < state().own_rows;
      const int row = real ? 4 * four + lane / 8 : 0;
      const auto* from =
          reinterpret_cast<const float4*>(x_rows()) + static_cast<int64_t>(row) * quads;
      float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
      for (int quad = own; quad < quads; quad += 8) {
        const float4 value = from[quad];
        sum += value.x + value.y + (value.z + value.w);
      }
      const float mean = sum_of(sum) * scale_of_sum;
#pragma unroll 4
      for (int quad = own; quad < quads; quad += 8) {
        const float4 raw = from[quad];
        const float value[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float centred = 4 * quad + j < dim ? value[j] - mean : 0.0f;
          squares = fmaf(centred, centred, squares);
        }
      }
      const float scale = rsqrtf(fmaf(sum_of(squares), scale_of_sum, model().eps));
      if (!real) continue;
      const MlpPlace place = places()[row];
      W* to = states +
              ((state().first + place.request) * problem().tokens.tokens + place.position) * dim;
#pragma unroll 4
      for (int quad = own; quad < quads; quad += 8) {
        const float4 raw = from[quad];
        const float value[4] = {raw.x, raw.y, raw.z, raw.w};
        const float4 g = __ldg(reinterpret_cast<const float4*>(model().norm) + quad);
        const float4 s =
            __ldg(reinterpret_cast<const float4*>(model().norm + shape().dim_pad) + quad);
        const float gain[4] = {g.x, g.y, g.z, g.w}, shift[4] = {s.x, s.y, s.z, s.w};
        float out[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = fmaf((value[j] - mean) * scale, gain[j], shift[j]);
        if (dim % 4 == 0) {
          if (4 * quad < dim) N::store_four(to + 4 * quad, out);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (4 * quad + j < dim) to[4 * quad + j] = static_cast<W>(out[j]);
        }
      }
    }
  }

  static __device__ __forceinline__ void cluster_barrier() {
    if (shape().cluster == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }

  static __device__ void run() {
    const TokensView& tokens = problem().tokens;
    const int cluster = static_cast<int>(blockIdx.x) / shape().cluster, roles = model().num_roles;
    const int64_t sum_quads = static_cast<int64_t>(shape().slots) * roles * (shape().dim_pad / 4);
    int turn = 0;  // sums of a layer are read while others write those of the next
    for (int64_t segment = 0; segment < tokens.batch; segment += kSegment) {
      const int count =
          static_cast<int>(min(static_cast<int64_t>(kSegment), tokens.batch - segment));
      share_of_segment(tokens, segment, count, cluster, shape().clusters,
                       reinterpret_cast<int*>(memory()), state());
      const int64_t end = segment + state().end;
      for (int64_t at = segment + state().begin; at < end; at += state().requests) {
        form_mlp_group(tokens, roles, shape(), at, end, state());
        clear_masked(tokens, static_cast<W*>(problem().states), model().dim, at, state().requests,
                     state().rank * kMlpWarps + warp_index(), shape().cluster * kMlpWarps);
        embed();
        for (int l = 0; l < model().num_layers; ++l, turn ^= 1) {
          __syncthreads();
          float4* sums = reinterpret_cast<float4*>(state().partial) + turn * sum_quads;
          add_up(sums);
          cluster_barrier();
          form_means(sums);
          __syncthreads();
          const MlpLayerView& layer = model().layers[l];
          for (int role = state().rank; role < roles; role += shape().cluster) {
            const int rows = state().rows[role], most = kMlpTileRows * shape().tiles;
            for (int done = 0; done < rows; done += most)
              pass(layer, role, state().base[role] + done, min(rows - done, most), done == 0);
          }
        }
        __syncthreads();
        finish();
      }
    }
  }
};

template <class W>
__global__ void __launch_bounds__(kMlpThreads, 1)
    encode_mlp_kernel(const __grid_constant__ EncodeMlpProblem problem,
                      const __grid_constant__ MlpShape shape, char* workspace) {
  if (threadIdx.x == 0) {
    MlpState& state = MlpEncoder<W>::state();
    char* own = workspace + blockIdx.x * shape.block_bytes;
    state.rank = shape.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
    state.x = reinterpret_cast<float*>(own);
    state.places = reinterpret_cast<MlpPlace*>(own + shape.rows_at);
    state.problem = problem;
    state.shape = shape;
    state.partial = reinterpret_cast<float*>(workspace + shape.sums_at +
                                             blockIdx.x / shape.cluster * shape.cluster_bytes);
  }
  __syncthreads();
  MlpEncoder<W>::run();
}

}  // namespace sidmlp::cuda::sm90

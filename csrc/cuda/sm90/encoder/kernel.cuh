// The general T5 encoder: any sizes, products by mma.sync with weights straight from global memory.
//
// A block, or a cluster of them, takes a group of requests through all layers. Each request begins
// a new tile of 16 rows, so that no tile mixes requests. In a cluster each block computes some
// heads and some feed-forward columns for all rows, and finishes the rows whose index is its rank
// modulo the cluster's size: it alone holds their residual, adds up the blocks' partial sums and
// hands the normed rows to all.
//
//   rows:   x <- x + sums; n = RMSNorm(x)           rows of a block, n -> every block
//   heads:  q, k, v = n W; mixed = softmax(q k + bias) v     heads of a block, some at a time
//   sums <- mixed W_o;  rows;  hidden = act(n W_i), sums <- hidden W_o;  rows;  next layer
//
// Requests of more rows than fit go tile by tile: first keys and values of all tiles, through the
// workspace, then the rest of the layer for each tile.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/encoder/activation.cuh"
#include "cuda/sm90/encoder/attention.cuh"
#include "cuda/sm90/encoder/requests.cuh"

namespace sidmlp::cuda::sm90 {

template <class T, int kCount>
constexpr __device__ __forceinline__ int count_of(const T (&)[kCount]) {
  return kCount;
}

enum class RowSource { kEmbedding, kWorkspace, kSums };
enum class RowTarget { kNormed, kStates, kWorkspace };

// What every function of a block reads, at the beginning of its dynamic shared memory, where each
// access is one instruction.
template <int kBlockWarps>
struct EncodeBlock {
  EncodeT5Problem problem;
  EncodeShape shape;
  EncodeState<kMaxTiles, kBlockWarps> state;
  char* workspace;
  int rank;
  int first_head, heads;      // of this block
  int first_hidden, hiddens;  // feed-forward columns of this block
};
static_assert(sizeof(EncodeBlock<kEncodeThreads / kWarp>) <= kEncodeBlockBytes,
              "the host adds as much");

extern __shared__ __align__(128) char encode_memory[];

__device__ __forceinline__ char* block_memory() { return encode_memory + kEncodeBlockBytes; }

template <class W, int kHead, bool kExact>
struct Encoder {
  static constexpr int kBlockWarps = kEncodeThreads / kWarp;
  static constexpr int kBlockThreads = kEncodeThreads;

  __device__ __forceinline__ static EncodeBlock<kBlockWarps>& block() {
    return *reinterpret_cast<EncodeBlock<kBlockWarps>*>(encode_memory);
  }

  __device__ __forceinline__ static const T5View& model() { return block().problem.model; }
  __device__ __forceinline__ static int head_dim() { return kExact ? kHead : model().head_dim; }
  // Columns of a head in shared memory: the pieces of 32 that a product reads.
  __device__ __forceinline__ static int head_slot() { return (head_dim() + 31) / 32 * 32; }
  __device__ __forceinline__ static Rows rows_at(int offset, int bytes) {
    return {ptx::shared_address(block_memory() + offset), bytes};
  }
  __device__ __forceinline__ static void barrier() {
    if (block().shape.cluster == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    }
  }

  // ---- rows ----

  // The rows of this block among 16 * tiles: from `source`, then normed or as they are -> target.
  // kLanes threads a row. Rows without a token become zeros: nothing in them may meet a product.
  template <int kLanes>
  __device__ __forceinline__ static void finish(RowSource source, RowTarget target,
                                                const float* gain, const Group& group, int tiles,
                                                int first_row) {
    constexpr int kParts = 512 / (4 * kLanes);
    const int dim = model().dim, tid = static_cast<int>(threadIdx.x), part = tid % kLanes;
    const int own_rows =
        (kTileRows * tiles - block().rank + block().shape.cluster - 1) / block().shape.cluster;
    const Rows normed = rows_at(block().shape.normed, block().shape.normed_bytes);
    for (int begin = 0; begin < own_rows; begin += kBlockThreads / kLanes) {
      const int i = begin + tid / kLanes, row = block().rank + i * block().shape.cluster;
      const bool there = i < own_rows;
      const int owner = there ? block().state.owner[row] : -1;
      const int64_t request = group.first + owner;
      float* x = reinterpret_cast<float*>(block_memory() + block().shape.x +
                                          (there ? i : 0) * block().shape.x_bytes);
      float* saved = reinterpret_cast<float*>(block().workspace + block().shape.workspace_x) +
                     static_cast<int64_t>(first_row + row) * dim;
      float4 v[kParts];
      const W* embedding = nullptr;  // of an id outside the vocabulary: none, NaN
      if (source == RowSource::kEmbedding && owner >= 0) {
        const int64_t id =
            __ldg(block().problem.tokens.ids + request * block().problem.tokens.tokens +
                  block().state.position[row]);
        if (id >= 0 && id < model().vocab_size)
          embedding = static_cast<const W*>(model().embedding) + id * dim;
      }
      float squares = 0.0f;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int column = 4 * (part + kLanes * j);
        v[j] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (column >= dim || owner < 0) continue;
        if (source == RowSource::kEmbedding) {
          if (embedding == nullptr) {
            const float nan = __int_as_float(0x7fc00000);
            v[j] = {nan, nan, nan, nan};
          } else {
            const uint2 raw = __ldg(reinterpret_cast<const uint2*>(embedding + column));
            const float2 low = widen_two<W>(raw.x), high = widen_two<W>(raw.y);
            v[j] = {low.x, low.y, high.x, high.y};
          }
        } else if (source == RowSource::kWorkspace) {
          v[j] = *reinterpret_cast<const float4*>(saved + column);
        } else {
          v[j] = *reinterpret_cast<const float4*>(x + column);
          if (block().shape.cluster > 1) {
            const char* partial =
                block_memory() + block().shape.partial + row * block().shape.x_bytes + 4 * column;
            float4 p[8];
#pragma unroll
            for (int peer = 0; peer < 8; ++peer)
              if (peer < block().shape.cluster)
                p[peer] = ptx::load_peer(ptx::peer_address(partial, static_cast<uint32_t>(peer)));
            float4 sum = p[0];
#pragma unroll
            for (int peer = 1; peer < 8; ++peer) {
              if (peer >= block().shape.cluster) continue;
              sum.x += p[peer].x, sum.y += p[peer].y, sum.z += p[peer].z, sum.w += p[peer].w;
            }
            v[j].x += sum.x, v[j].y += sum.y, v[j].z += sum.z, v[j].w += sum.w;
          }
        }
        squares += (v[j].x * v[j].x + v[j].y * v[j].y) + (v[j].z * v[j].z + v[j].w * v[j].w);
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        squares += __shfl_xor_sync(kAllLanes, squares, distance);
      const float scale = rsqrtf(squares / static_cast<float>(dim) + model().layer_norm_eps);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int column = 4 * (part + kLanes * j);
        if (column >= dim || !there) continue;
        if (target == RowTarget::kWorkspace) {
          *reinterpret_cast<float4*>(saved + column) = v[j];
          continue;
        }
        const float4 w = __ldg(reinterpret_cast<const float4*>(gain + column));
        const uint2 word{narrow_two<W>(v[j].x * scale * w.x, v[j].y * scale * w.y),
                         narrow_two<W>(v[j].z * scale * w.z, v[j].w * scale * w.w)};
        if (target == RowTarget::kStates) {
          if (owner < 0) continue;
          W* to = static_cast<W*>(block().problem.states) +
                  (request * block().problem.tokens.tokens + block().state.position[row]) * dim +
                  column;
          *reinterpret_cast<uint2*>(to) = word;
          continue;
        }
        if (source != RowSource::kSums || block().shape.cluster > 1)
          *reinterpret_cast<float4*>(x + column) = v[j];
        const uint32_t to = normed.at(row, column);
        if (block().shape.cluster == 1) {
          ptx::store_half_piece(to, word);
        } else {
          for (int peer = 0; peer < block().shape.cluster; ++peer) {
            ptx::store_peer(ptx::peer_of(to, static_cast<uint32_t>(peer)), word);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void rows(RowSource source, RowTarget target, const float* gain,
                                              const Group& group, int tiles, int first_row) {
    barrier();  // sums are complete, and nobody reads the last normed rows
    if (block().shape.cluster == 1) {
      finish<8>(source, target, gain, group, tiles, first_row);
    } else {
      finish<32>(source, target, gain, group, tiles, first_row);
    }
    if (target == RowTarget::kNormed) barrier();
  }

  // ---- products ----

  // Queries, keys and values (parts 0 .. 2, from `part` on) of some heads -> shared memory.
  __device__ __forceinline__ static void project(const T5LayerView& layer, int head, int count,
                                                 int part, int parts, int tiles) {
    const int width = model().num_heads * head_dim(), per_head = head_dim() / 16;
    const int per_part = count * per_head, slot = head_slot();
    const Rows query = rows_at(block().shape.query, block().shape.head_bytes);
    const Rows key = rows_at(block().shape.key, block().shape.head_bytes);
    const Rows value = rows_at(block().shape.value, block().shape.head_bytes);
    const auto row_of = [&](int c) {
      return (part + c / per_part) * width + (block().first_head + head) * head_dim() +
             16 * (c % per_part);
    };
    const auto store = [&](int first, int begin, const auto& sum) {
#pragma unroll
      for (int i = 0; i < count_of(sum); ++i) {
        const int c = begin + i;
        if (c >= parts * per_part) break;
        const int of = part + c / per_part, within = c % per_part;
        const Rows& to = of == 0 ? query : of == 1 ? key : value;
        const int column = within / per_head * slot + within % per_head * 16;
#pragma unroll
        for (int n = 0; n < count_of(sum[0]); n += 2)
          store_block<W>(to, kTileRows * first + 8 * n, column,
                         [&](int half, int j) { return sum[i][n + half][j]; });
      }
    };
    const Rows normed = rows_at(block().shape.normed, block().shape.normed_bytes);
    const W* weight = static_cast<const W*>(layer.qkv);
    product<W, 2, kBlockWarps>(normed, tiles, model().dim, weight, model().dim, parts * per_part,
                               row_of, store);
  }

  // a [16 * tiles, inner] times w [D, ..]^T -> into the residual of one block, or the partial sums
  // of a cluster: added to those there, or instead of them.
  __device__ __forceinline__ static void product_into_sums(const Rows& a, int inner,
                                                           const W* weight, int stride, int tiles,
                                                           bool add) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4, columns = model().dim / 16;
    const bool keep = add || block().shape.cluster == 1;
    const int x_bytes = block().shape.x_bytes;
    char* to = block_memory() +
               (block().shape.cluster == 1 ? block().shape.x : block().shape.partial) +
               2 * t * x_bytes + 4 * g;
    const auto row_of = [](int c) { return 16 * c; };
    const auto store = [&](int first, int begin, const auto& sum) {
#pragma unroll
      for (int i = 0; i < count_of(sum); ++i) {
        if (begin + i >= columns) break;
#pragma unroll
        for (int n = 0; n < count_of(sum[0]); ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            auto* place = reinterpret_cast<float*>(
                to + (kTileRows * first + 8 * n + j % 2) * x_bytes + 64 * (begin + i) + j / 2 * 32);
            *place = keep ? *place + sum[i][n][j] : sum[i][n][j];
          }
        }
      }
    };
    product<W, 2, kBlockWarps>(a, tiles, inner, weight, stride, columns, row_of, store);
  }

  template <bool kGated, bool kRelu>
  __device__ __forceinline__ static void hidden(const T5LayerView& layer, int first_column,
                                                int count, int tiles) {
    const int columns = (kGated ? 2 : 1) * count / 16, ffn = model().ffn_dim;
    const Rows to = rows_at(block().shape.hidden, block().shape.hidden_bytes);
    const Activation activation = kRelu    ? Activation::kRelu
                                  : kGated ? Activation::kGatedGelu
                                           : Activation::kGelu;
    const Rows normed = rows_at(block().shape.normed, block().shape.normed_bytes);
    const W* weight = static_cast<const W*>(layer.ffn_in);
    const auto row_of = [&](int c) {
      return kGated ? c % 2 * ffn + first_column + 16 * (c / 2) : first_column + 16 * c;
    };
    const auto store = [&](int first, int begin, const auto& sum) {
      constexpr int kStep = kGated ? 2 : 1;
#pragma unroll
      for (int i = 0; i < count_of(sum); i += kStep) {
        if (begin + i >= columns) break;
#pragma unroll
        for (int n = 0; n < count_of(sum[0]); n += 2)
          store_block<W>(to, kTileRows * first + 8 * n, (begin + i) / kStep * 16,
                         [&](int half, int j) {
                           const float x = activate<W>(activation, sum[i][n + half][j]);
                           return kGated ? x * sum[i + kStep - 1][n + half][j] : x;
                         });
      }
    };
    product<W, 2, kBlockWarps>(normed, tiles, model().dim, weight, model().dim, columns, row_of,
                               store);
  }

  // ---- attention ----

  // The position bias of this block's heads head .. head + count - 1 -> shared memory.
  __device__ __forceinline__ static void load_bias(int head, int count) {
    const int tokens = block().problem.tokens.tokens, most = model().bias_tokens;
    auto* to = reinterpret_cast<float*>(block_memory() + block().shape.bias);
    for (int h = 0; h < count; ++h) {
      const float* from = model().position_bias +
                          static_cast<int64_t>(block().first_head + head + h) * (2 * most - 1) +
                          most - tokens;
      for (int i = static_cast<int>(threadIdx.x); i < 2 * tokens - 1; i += kBlockThreads)
        to[h * block().shape.bias_stride + i] = __ldg(from + i);
    }
  }
  __device__ __forceinline__ static uint32_t bias_of(int head, int h) {
    const int at = block().shape.bias_heads == block().shape.own_heads ? head + h : h;
    return ptx::shared_address(block_memory() + block().shape.bias) +
           static_cast<uint32_t>(4 * at * block().shape.bias_stride);
  }

  __device__ __forceinline__ static void attend(int head, int count, int tiles) {
    const Rows query = rows_at(block().shape.query, block().shape.head_bytes);
    const Rows key = rows_at(block().shape.key, block().shape.head_bytes);
    const Rows value = rows_at(block().shape.value, block().shape.head_bytes);
    const int slot = head_slot();
    for (int unit = warp_index(); unit < count * tiles; unit += kBlockWarps) {
      const int h = unit / tiles, tile = unit % tiles;
      const int first = block().state.tile_first[tile], tokens = block().state.tile_count[tile];
      QueryTile<W, kHead, kExact> q{};
      q.begin(query, tile, h * slot, head_dim(), block().state.position,
              block().problem.tokens.tokens);
      for (int k = 0; k < tokens; k += kKeyBlock)
        q.add_block(key, value, first + k, min(tokens - k, kKeyBlock), h * slot,
                    ptx::shared_address(block().state.position), bias_of(head, h));
      q.store(rows_at(block().shape.mixed, block().shape.mixed_bytes), tile,
              (head + h) * head_dim());
    }
  }

  // Keys and values of a tile of a long request -> workspace [head][row][2][head_dim].
  __device__ __forceinline__ static void save_keys(int head, int count, int rows, W* saved,
                                                   int first, int all_rows) {
    const Rows key = rows_at(block().shape.key, block().shape.head_bytes);
    const Rows value = rows_at(block().shape.value, block().shape.head_bytes);
    const int pieces = head_dim() / 8, slot = head_slot();
    for (int i = static_cast<int>(threadIdx.x); i < count * rows * 2 * pieces; i += kBlockThreads) {
      const int piece = i % (2 * pieces), row = i / (2 * pieces) % rows,
                of = i / (2 * pieces) / rows;
      const Rows& from = piece < pieces ? key : value;
      *reinterpret_cast<uint4*>(
          saved + (static_cast<int64_t>(head + of) * all_rows + first + row) * 2 * head_dim() +
          8 * piece) = ptx::load_piece(from.at(row, of * slot + piece % pieces * 8));
    }
  }

  // The same for a tile of a long request, whose keys and values come from the workspace.
  __device__ __noinline__ static void attend_long(int head, int count, int tiles, int tokens,
                                                  const W* saved, const int* position) {
    const Rows query = rows_at(block().shape.query, block().shape.head_bytes);
    const Rows key = rows_at(block().shape.key, block().shape.head_bytes);
    const Rows value = rows_at(block().shape.value, block().shape.head_bytes);
    const int slot = head_slot(), all_rows = (tokens + kTileRows - 1) / kTileRows * kTileRows;
    const int pieces = head_dim() / 8;
    for (int begin = 0; begin < count * tiles; begin += kBlockWarps) {
      const int unit = begin + warp_index(), h = unit / tiles, tile = unit % tiles;
      const bool active = unit < count * tiles;
      QueryTile<W, kHead, kExact> q{};
      if (active)
        q.begin(query, tile, h * slot, head_dim(), block().state.position,
                block().problem.tokens.tokens);
      for (int k = 0; k < tokens; k += kKeyBlock) {
        __syncthreads();
        const int copied = min(all_rows - k, kKeyBlock);
        for (int i = static_cast<int>(threadIdx.x); i < count * copied * 2 * pieces;
             i += kBlockThreads) {
          const int piece = i % (2 * pieces), row = i / (2 * pieces) % copied;
          const int of = i / (2 * pieces) / copied;
          const uint4 word = *reinterpret_cast<const uint4*>(
              saved + (static_cast<int64_t>(head + of) * all_rows + k + row) * 2 * head_dim() +
              8 * piece);
          const Rows& to = piece < pieces ? key : value;
          ptx::store_piece(to.at(row, of * slot + piece % pieces * 8), word);
        }
        for (int i = static_cast<int>(threadIdx.x); i < copied; i += kBlockThreads)
          block().state.key_position[i] = position[k + i];
        __syncthreads();
        if (active)
          q.add_block(key, value, 0, min(tokens - k, kKeyBlock), h * slot,
                      ptx::shared_address(block().state.key_position), bias_of(head, h));
      }
      if (active)
        q.store(rows_at(block().shape.mixed, block().shape.mixed_bytes), tile,
                (head + h) * head_dim());
    }
  }

  // ---- requests ----

  // Positions of the rows of one tile of a long request.
  __device__ __forceinline__ static void take_tile(const int* position, int first, int tiles,
                                                   int tokens) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * tiles; i += kBlockThreads) {
      block().state.position[i] = position[first + i];
      block().state.owner[i] = first + i < tokens ? 0 : -1;
    }
  }

  // Mixed values of this block's heads <- normed rows; for a long request of one tile, from or,
  // with only_keys, just into the workspace.
  __device__ __forceinline__ static void mix(const T5LayerView& layer, const Group& group,
                                             bool only_keys, int first, int tiles, W* saved,
                                             const int* position) {
    const EncodeShape& shape = block().shape;
    const int heads = block().heads, tokens = block().state.counts[0];
    const int begin_part = only_keys ? 1 : 0, parts = only_keys ? 2 : group.is_long ? 1 : 3;
    for (int head = 0; head < heads; head += shape.heads_at_once) {
      const int count = min(shape.heads_at_once, heads - head);
      if (head > 0) __syncthreads();
      if (shape.bias_heads != shape.own_heads) load_bias(head, count);
      project(layer, head, count, begin_part, parts, tiles);
      __syncthreads();
      if (!group.is_long) {
        attend(head, count, tiles);
      } else if (only_keys) {
        save_keys(head, count, kTileRows * tiles, saved, first, kTileRows * group.tiles);
      } else {
        attend_long(head, count, tiles, tokens, saved, position);
      }
    }
  }

  // Sums <- what mixed values, or the feed-forward of normed rows, add to the residual.
  __device__ __forceinline__ static void into_sums(const T5LayerView& layer, bool ffn, int tiles) {
    const EncodeShape& shape = block().shape;
    const int mixed = block().heads * head_dim(), hiddens = block().hiddens;
    int done = 0;
    do {  // a block without columns has sums of 0
      const int count = ffn ? min(shape.ffn_chunk, hiddens - done) : mixed;
      if (ffn) {
        if (done > 0) __syncthreads();
        const int first = block().first_hidden + done;
        const Activation activation = model().activation;
        if (activation == Activation::kRelu) {
          hidden<false, true>(layer, first, count, tiles);
        } else if (activation == Activation::kGelu) {
          hidden<false, false>(layer, first, count, tiles);
        } else if (activation == Activation::kGatedRelu) {
          hidden<true, true>(layer, first, count, tiles);
        } else {
          hidden<true, false>(layer, first, count, tiles);
        }
      }
      __syncthreads();
      const W* weight =
          ffn ? static_cast<const W*>(layer.ffn_out) + block().first_hidden + done
              : static_cast<const W*>(layer.attention_out) + block().first_head * head_dim();
      product_into_sums(
          ffn ? rows_at(shape.hidden, shape.hidden_bytes) : rows_at(shape.mixed, shape.mixed_bytes),
          count, weight, ffn ? model().ffn_dim : model().num_heads * head_dim(), tiles, done > 0);
      done += count;
    } while (ffn && done < hiddens);
  }

  // All layers. A long request takes two passes over its tiles each layer, keys and values first,
  // and one before the layers (-1) and after them to read embeddings and write states. One loop for
  // all of it, so that each product is compiled once.
  __device__ __forceinline__ static void encode(const Group& group, const int* position) {
    const EncodeShape& shape = block().shape;
    const int layers = model().num_layers;
    auto* saved = reinterpret_cast<W*>(block().workspace + shape.workspace_kv);
    for (int l = group.is_long ? -1 : 0; l <= layers; ++l) {
      const bool inside = l >= 0 && l < layers;
      const T5LayerView& layer = model().layers[inside ? l : 0];
      for (int pass = group.is_long && inside ? 0 : 1; pass < 2; ++pass) {
        for (int done = 0; done < group.tiles; done += shape.tiles) {
          const int first = kTileRows * done, tiles = min(shape.tiles, group.tiles - done);
          if (group.is_long) take_tile(position, first, tiles, block().state.counts[0]);
          for (int half = 0;; ++half) {
            RowSource source = RowSource::kSums;
            if (half == 0 && group.is_long) source = RowSource::kWorkspace;
            if (half == 0 && l == (group.is_long ? -1 : 0)) source = RowSource::kEmbedding;
            const RowTarget target = l == layers          ? RowTarget::kStates
                                     : l < 0 || half == 2 ? RowTarget::kWorkspace
                                                          : RowTarget::kNormed;
            const float* gain = l == layers ? model().final_gain
                                : half == 0 ? layer.attention_gain
                                            : layer.ffn_gain;
            rows(source, target, gain, group, tiles, first);
            if (target != RowTarget::kNormed) break;
            if (half == 0) mix(layer, group, pass == 0, first, tiles, saved, position);
            if (pass == 0) break;
            into_sums(layer, half == 1, tiles);
            if (half == 1 && !group.is_long) break;
          }
        }
      }
    }
  }

  __device__ __forceinline__ static void run(int cluster) {
    const int64_t batch = block().problem.tokens.batch;
    auto* positions = reinterpret_cast<int*>(block().workspace + block().shape.workspace_position);
    if (block().shape.bias_heads == block().shape.own_heads) load_bias(0, block().heads);
    for (int64_t segment = 0; segment < batch; segment += kSegment) {
      const int count = static_cast<int>(min(static_cast<int64_t>(kSegment), batch - segment));
      share_of_segment(block().problem.tokens, segment, count, cluster, block().shape.clusters,
                       block().shape.tiles, block_memory() + block().shape.mixed, block().state);
      const int64_t end = segment + block().state.end;
      for (int64_t first = segment + block().state.begin; first < end;) {
        const Group group = form_group(block().problem.tokens, first, end, block().shape.tiles,
                                       positions, block().state);
        if (group.tiles > 0) encode(group, positions);
        clear_masked(block().problem.tokens, block().problem.states, model().dim, group,
                     block().rank * kBlockWarps + warp_index(),
                     block().shape.cluster * kBlockWarps);
        first += group.requests;
      }
    }
  }
};

template <class W, int kHead, bool kExact>
__global__ void __launch_bounds__(kEncodeThreads, 1)
    encode_t5_kernel(const __grid_constant__ EncodeT5Problem problem,
                     const __grid_constant__ EncodeShape shape, char* workspace) {
  using E = Encoder<W, kHead, kExact>;
  auto& b = E::block();
  if (threadIdx.x == 0) {
    b.problem = problem;
    b.shape = shape;
    const int rank = shape.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
    const int heads = problem.model.num_heads, units = problem.model.ffn_dim / 16;
    b.workspace = workspace + blockIdx.x * shape.workspace_bytes;
    b.rank = rank;
    b.first_head = heads * rank / shape.cluster;
    b.heads = heads * (rank + 1) / shape.cluster - b.first_head;
    b.first_hidden = 16 * (units * rank / shape.cluster);
    b.hiddens = 16 * (units * (rank + 1) / shape.cluster) - b.first_hidden;
  }
  __syncthreads();
  E::run(static_cast<int>(blockIdx.x) / shape.cluster);
  E::barrier();  // others may still read this block's sums
}

template <class W>
const void* encode_kernel_of(int head_dim) {
  return head_dim == 64 ? reinterpret_cast<const void*>(&encode_t5_kernel<W, 64, true>)
                        : reinterpret_cast<const void*>(&encode_t5_kernel<W, 128, false>);
}

}  // namespace sidmlp::cuda::sm90

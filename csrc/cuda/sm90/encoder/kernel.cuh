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

#include "cuda/ptx/cluster_rows.cuh"
#include "cuda/sm90/encoder/activation.cuh"
#include "cuda/sm90/encoder/attention.cuh"
#include "cuda/sm90/encoder/requests.cuh"

namespace sidmlp::cuda::sm90 {

enum class RowSource { kEmbedding, kWorkspace, kSums };
enum class RowTarget { kNormed, kStates, kWorkspace };

// What every function of a block reads, at the beginning of its dynamic shared memory, where each
// access is one instruction. The functions are compiled once each: inlined into one kernel they
// spill, and take minutes to compile.
struct EncodeBlock {
  EncodeT5Problem problem;
  EncodeShape shape;
  EncodeState state;
  char* workspace;
  int rank;
  int first_head, heads;      // of this block
  int first_hidden, hiddens;  // feed-forward columns of this block
};
static_assert(sizeof(EncodeBlock) <= kEncodeBlockBytes, "the host adds as much");

extern __shared__ __align__(128) char encode_memory[];

__device__ __forceinline__ EncodeBlock& block() {
  return *reinterpret_cast<EncodeBlock*>(encode_memory);
}
__device__ __forceinline__ char* block_memory() { return encode_memory + kEncodeBlockBytes; }

template <class W, int kHead, bool kExact>
struct Encoder {
  __device__ __forceinline__ static const T5View& model() { return block().problem.model; }
  __device__ __forceinline__ static int head_dim() { return kExact ? kHead : model().head_dim; }
  // Columns of a head in shared block_memory(): the pieces of 32 that a product reads.
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
  __device__ __noinline__ static void finish(RowSource source, RowTarget target, const float* gain,
                                             const Group& group, int tiles, int first_row) {
    constexpr int kParts = 512 / (4 * kLanes);
    const int dim = model().dim, tid = static_cast<int>(threadIdx.x), part = tid % kLanes;
    const int own_rows =
        (kTileRows * tiles - block().rank + block().shape.cluster - 1) / block().shape.cluster;
    const Rows normed = rows_at(block().shape.normed, block().shape.normed_bytes);
    for (int begin = 0; begin < own_rows; begin += kThreads / kLanes) {
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
                                              const Group& group, int tiles, int first_row = 0) {
    barrier();  // sums are complete, and nobody reads the last normed rows
    if (block().shape.cluster == 1) {
      finish<8>(source, target, gain, group, tiles, first_row);
    } else {
      finish<32>(source, target, gain, group, tiles, first_row);
    }
    if (target == RowTarget::kNormed) barrier();
  }

  // ---- products ----

  // Queries, keys and values (parts 0 .. 2, from `part` on) of some block().heads -> shared
  // block_memory(); or with `saved`, keys and values -> block().workspace, from that row on.
  __device__ __noinline__ static void project(const T5LayerView& layer, int head, int count,
                                              int part, int parts, int tiles, W* saved,
                                              int saved_rows) {
    const int width = model().num_heads * head_dim(), per_head = head_dim() / 8;
    const int per_part = count * per_head, lane = lane_index(), g = lane / 4, t = lane % 4;
    const int slot = head_slot();
    product<W, false>(
        rows_at(block().shape.normed, block().shape.normed_bytes), tiles, model().dim,
        static_cast<const W*>(layer.qkv), model().dim, parts * per_part,
        [&](int c) {
          return (part + c / per_part) * width + (block().first_head + head) * head_dim() +
                 8 * (c % per_part);
        },
        [&](int m, int begin, const auto& sum) {
#pragma unroll
          for (int i = 0; i < static_cast<int>(sizeof(sum) / sizeof(sum[0])); ++i) {
            const int c = begin + i;
            if (c >= parts * per_part) break;
            const int of = part + c / per_part, within = c % per_part;
            const int h = within / per_head, column = within % per_head * 8 + 2 * t;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int row = kTileRows * m + g + 8 * r;
              const uint32_t word = narrow_two<W>(sum[i][2 * r], sum[i][2 * r + 1]);
              if (saved != nullptr) {
                W* to = saved +
                        (static_cast<int64_t>(head + h) * saved_rows + row) * 2 * head_dim() +
                        (of - 1) * head_dim() + column;
                *reinterpret_cast<uint32_t*>(to) = word;
              } else {
                const int offset = of == 0   ? block().shape.query
                                   : of == 1 ? block().shape.key
                                             : block().shape.value;
                ptx::store_word(
                    rows_at(offset, block().shape.head_bytes).at(row, h * slot + column), word);
              }
            }
          }
        });
  }

  // a [16 * tiles, inner] times w [D, ..]^T -> into the residual of one block, or the partial sums
  // of a cluster: added to those there, or instead of them.
  __device__ __noinline__ static void product_into_sums(const Rows& a, int inner, const W* weight,
                                                        int stride, int tiles, bool add) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4, columns = model().dim / 8;
    const bool keep = add || block().shape.cluster == 1;
    char* to =
        block_memory() + (block().shape.cluster == 1 ? block().shape.x : block().shape.partial);
    product<W, false>(
        a, tiles, inner, weight, stride, columns, [](int c) { return 8 * c; },
        [&](int m, int begin, const auto& sum) {
#pragma unroll
          for (int i = 0; i < static_cast<int>(sizeof(sum) / sizeof(sum[0])); ++i) {
            if (begin + i >= columns) break;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              auto* place = reinterpret_cast<float2*>(
                  to + (kTileRows * m + g + 8 * r) * block().shape.x_bytes + 32 * (begin + i) +
                  8 * t);
              float2 value{sum[i][2 * r], sum[i][2 * r + 1]};
              if (keep) {
                const float2 old = *place;
                value = {old.x + value.x, old.y + value.y};
              }
              *place = value;
            }
          }
        });
  }

  template <bool kGated>
  __device__ __noinline__ static void hidden(const T5LayerView& layer, int first, int count,
                                             int tiles) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4,
              columns = (kGated ? 2 : 1) * count / 8;
    const Rows to = rows_at(block().shape.hidden, block().shape.hidden_bytes);
    const Activation activation = model().activation;
    product<W, kGated>(
        rows_at(block().shape.normed, block().shape.normed_bytes), tiles, model().dim,
        static_cast<const W*>(layer.ffn_in), model().dim, columns,
        [&](int c) {
          return kGated ? c % 2 * model().ffn_dim + first + 8 * (c / 2) : first + 8 * c;
        },
        [&](int m, int begin, const auto& sum) {
          constexpr int kN = static_cast<int>(sizeof(sum) / sizeof(sum[0])), kStep = kGated ? 2 : 1;
#pragma unroll
          for (int i = 0; i + kStep <= kN; i += kStep) {
            if (begin + i >= columns) break;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float low = activate<W>(activation, sum[i][2 * r]);
              float high = activate<W>(activation, sum[i][2 * r + 1]);
              if constexpr (kGated) low *= sum[i + 1][2 * r], high *= sum[i + 1][2 * r + 1];
              ptx::store_word(to.at(kTileRows * m + g + 8 * r, (begin + i) / kStep * 8 + 2 * t),
                              narrow_two<W>(low, high));
            }
          }
        });
  }

  __device__ __forceinline__ static void feed_forward(const T5LayerView& layer, int tiles) {
    int done = 0;
    do {  // a block without columns has sums of 0
      const int count = min(block().shape.ffn_chunk, block().hiddens - done);
      if (is_gated(model().activation)) {
        hidden<true>(layer, block().first_hidden + done, count, tiles);
      } else {
        hidden<false>(layer, block().first_hidden + done, count, tiles);
      }
      __syncthreads();
      product_into_sums(rows_at(block().shape.hidden, block().shape.hidden_bytes), count,
                        static_cast<const W*>(layer.ffn_out) + block().first_hidden + done,
                        model().ffn_dim, tiles, done > 0);
      done += count;
      if (done < block().hiddens) __syncthreads();
    } while (done < block().hiddens);
  }

  // ---- attention ----

  // The position bias of this block's block().heads head .. head + count - 1 -> shared
  // block_memory().
  __device__ __forceinline__ static void load_bias(int head, int count) {
    const int tokens = block().problem.tokens.tokens, most = model().bias_tokens;
    auto* to = reinterpret_cast<float*>(block_memory() + block().shape.bias);
    for (int h = 0; h < count; ++h) {
      const float* from = model().position_bias +
                          static_cast<int64_t>(block().first_head + head + h) * (2 * most - 1) +
                          most - tokens;
      for (int i = static_cast<int>(threadIdx.x); i < 2 * tokens - 1; i += kThreads)
        to[h * block().shape.bias_stride + i] = __ldg(from + i);
    }
  }
  __device__ __forceinline__ static uint32_t bias_of(int head, int h) {
    const int at = block().shape.bias_heads == block().shape.own_heads ? head + h : h;
    return ptx::shared_address(block_memory() + block().shape.bias) +
           static_cast<uint32_t>(4 * at * block().shape.bias_stride);
  }

  __device__ __noinline__ static void attend(int head, int count, int tiles) {
    const Rows query = rows_at(block().shape.query, block().shape.head_bytes);
    const Rows key = rows_at(block().shape.key, block().shape.head_bytes);
    const Rows value = rows_at(block().shape.value, block().shape.head_bytes);
    const int slot = head_slot();
    for (int unit = warp_index(); unit < count * tiles; unit += kWarps) {
      const int h = unit / tiles, tile = unit % tiles;
      const int first = block().state.tile_first[tile], tokens = block().state.tile_count[tile];
      QueryTile<W, kHead, kExact> q;
      q.begin(query, tile, h * slot, head_dim(), block().state.position,
              block().problem.tokens.tokens);
      for (int k = 0; k < tokens; k += kKeyBlock)
        q.add_block(key, value, first + k, min(tokens - k, kKeyBlock), h * slot,
                    ptx::shared_address(block().state.position), bias_of(head, h));
      q.store(rows_at(block().shape.mixed, block().shape.mixed_bytes), tile,
              (head + h) * head_dim());
    }
  }

  // The same for a tile of a long request, whose keys and values come from the block().workspace.
  __device__ __noinline__ static void attend_long(int head, int count, int tiles, int tokens,
                                                  const W* saved, const int* position) {
    const Rows query = rows_at(block().shape.query, block().shape.head_bytes);
    const Rows key = rows_at(block().shape.key, block().shape.head_bytes);
    const Rows value = rows_at(block().shape.value, block().shape.head_bytes);
    const int slot = head_slot(), all_rows = (tokens + kTileRows - 1) / kTileRows * kTileRows;
    const int pieces = head_dim() / 8;
    for (int begin = 0; begin < count * tiles; begin += kWarps) {
      const int unit = begin + warp_index(), h = unit / tiles, tile = unit % tiles;
      const bool active = unit < count * tiles;
      QueryTile<W, kHead, kExact> q;
      if (active)
        q.begin(query, tile, h * slot, head_dim(), block().state.position,
                block().problem.tokens.tokens);
      for (int k = 0; k < tokens; k += kKeyBlock) {
        __syncthreads();
        const int copied = min(all_rows - k, kKeyBlock);
        for (int i = static_cast<int>(threadIdx.x); i < count * copied * 2 * pieces;
             i += kThreads) {
          const int piece = i % (2 * pieces), row = i / (2 * pieces) % copied;
          const int of = i / (2 * pieces) / copied;
          const uint4 word = *reinterpret_cast<const uint4*>(
              saved + (static_cast<int64_t>(head + of) * all_rows + k + row) * 2 * head_dim() +
              8 * piece);
          const Rows& to = piece < pieces ? key : value;
          ptx::store_piece(to.at(row, of * slot + piece % pieces * 8), word);
        }
        for (int i = static_cast<int>(threadIdx.x); i < copied; i += kThreads)
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

  __device__ __forceinline__ static void mix_into_sums(const T5LayerView& layer, int tiles) {
    __syncthreads();
    product_into_sums(rows_at(block().shape.mixed, block().shape.mixed_bytes),
                      block().heads * head_dim(),
                      static_cast<const W*>(layer.attention_out) + block().first_head * head_dim(),
                      model().num_heads * head_dim(), tiles, false);
  }

  // ---- requests ----

  __device__ __forceinline__ static void encode_short(const Group& group) {
    const int tiles = group.tiles, layers = model().num_layers;
    rows(RowSource::kEmbedding, RowTarget::kNormed, model().layers[0].attention_gain, group, tiles);
    for (int l = 0; l < layers; ++l) {
      const T5LayerView& layer = model().layers[l];
      for (int head = 0; head < block().heads; head += block().shape.heads_at_once) {
        const int count = min(block().shape.heads_at_once, block().heads - head);
        if (head > 0) __syncthreads();
        if (block().shape.bias_heads != block().shape.own_heads) load_bias(head, count);
        project(layer, head, count, 0, 3, tiles, nullptr, 0);
        __syncthreads();
        attend(head, count, tiles);
      }
      mix_into_sums(layer, tiles);
      rows(RowSource::kSums, RowTarget::kNormed, layer.ffn_gain, group, tiles);
      feed_forward(layer, tiles);
      const bool last = l + 1 == layers;
      rows(RowSource::kSums, last ? RowTarget::kStates : RowTarget::kNormed,
           last ? model().final_gain : model().layers[l + 1].attention_gain, group, tiles);
    }
  }

  // Positions of the rows of one tile of a long request.
  __device__ __forceinline__ static void take_tile(const int* position, int first, int tiles,
                                                   int tokens) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kTileRows * tiles; i += kThreads) {
      block().state.position[i] = position[first + i];
      block().state.owner[i] = first + i < tokens ? 0 : -1;
    }
  }

  __device__ __forceinline__ static void encode_long(const Group& group, const int* position) {
    const int tokens = block().state.counts[0], all_rows = kTileRows * group.tiles;
    auto* saved = reinterpret_cast<W*>(block().workspace + block().shape.workspace_kv);
    auto for_tiles = [&](const auto& body) {
      for (int done = 0; done < group.tiles; done += block().shape.tiles) {
        const int tiles = min(block().shape.tiles, group.tiles - done);
        take_tile(position, kTileRows * done, tiles, tokens);
        body(kTileRows * done, tiles);
      }
    };
    for_tiles([&](int first, int tiles) {
      rows(RowSource::kEmbedding, RowTarget::kWorkspace, nullptr, group, tiles, first);
    });
    for (int l = 0; l < model().num_layers; ++l) {
      const T5LayerView& layer = model().layers[l];
      for_tiles([&](int first, int tiles) {
        rows(RowSource::kWorkspace, RowTarget::kNormed, layer.attention_gain, group, tiles, first);
        project(layer, 0, block().heads, 1, 2, tiles,
                saved + static_cast<int64_t>(first) * 2 * head_dim(), all_rows);
      });
      for_tiles([&](int first, int tiles) {
        rows(RowSource::kWorkspace, RowTarget::kNormed, layer.attention_gain, group, tiles, first);
        for (int head = 0; head < block().heads; head += block().shape.heads_at_once) {
          const int count = min(block().shape.heads_at_once, block().heads - head);
          if (head > 0) __syncthreads();
          if (block().shape.bias_heads != block().shape.own_heads) load_bias(head, count);
          project(layer, head, count, 0, 1, tiles, nullptr, 0);
          __syncthreads();
          attend_long(head, count, tiles, tokens, saved, position);
        }
        mix_into_sums(layer, tiles);
        rows(RowSource::kSums, RowTarget::kNormed, layer.ffn_gain, group, tiles, first);
        feed_forward(layer, tiles);
        rows(RowSource::kSums, RowTarget::kWorkspace, nullptr, group, tiles, first);
      });
    }
    for_tiles([&](int first, int tiles) {
      rows(RowSource::kWorkspace, RowTarget::kStates, model().final_gain, group, tiles, first);
    });
  }

  // States of masked tokens: zeros.
  __device__ __forceinline__ static void clear_masked(const Group& group) {
    const int pieces = model().dim / 8, tokens = block().problem.tokens.tokens;
    const int64_t begin = group.first * tokens,
                  count = static_cast<int64_t>(group.requests) * tokens;
    auto* states = static_cast<uint4*>(block().problem.states);
    for (int64_t i = block().rank * kWarps + warp_index(); i < count;
         i += block().shape.cluster * kWarps) {
      if (__ldg(block().problem.tokens.mask + begin + i) != 0) continue;
      for (int piece = lane_index(); piece < pieces; piece += kWarp)
        states[(begin + i) * pieces + piece] = uint4{0, 0, 0, 0};
    }
  }

  __device__ __forceinline__ static void run(int cluster) {
    const int64_t batch = block().problem.tokens.batch;
    auto* positions = reinterpret_cast<int*>(block().workspace + block().shape.workspace_position);
    if (block().shape.bias_heads == block().shape.own_heads) load_bias(0, block().heads);
    for (int64_t segment = 0; segment < batch; segment += kSegment) {
      const int count = static_cast<int>(min(static_cast<int64_t>(kSegment), batch - segment));
      share_of_segment(block().problem.tokens, segment, count, cluster, block().shape.clusters,
                       reinterpret_cast<int*>(block_memory() + block().shape.mixed), block().state);
      const int64_t end = segment + block().state.end;
      for (int64_t first = segment + block().state.begin; first < end;) {
        const Group group = form_group(block().problem.tokens, first, end, block().shape.tiles,
                                       positions, block().state);
        if (group.is_long) {
          encode_long(group, positions);
        } else if (group.tiles > 0) {
          encode_short(group);
        }
        clear_masked(group);
        first += group.requests;
      }
    }
  }
};

template <class W, int kHead, bool kExact>
__global__ void __launch_bounds__(kThreads, 1)
    encode_t5_kernel(const __grid_constant__ EncodeT5Problem problem,
                     const __grid_constant__ EncodeShape shape, char* workspace) {
  EncodeBlock& b = block();
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
  using E = Encoder<W, kHead, kExact>;
  E::run(static_cast<int>(blockIdx.x) / shape.cluster);
  E::barrier();  // others may still read this block's sums
}

template <class W>
const void* encode_kernel_of(int head_dim) {
  return head_dim == 64 ? reinterpret_cast<const void*>(&encode_t5_kernel<W, 64, true>)
                        : reinterpret_cast<const void*>(&encode_t5_kernel<W, 128, false>);
}

}  // namespace sidmlp::cuda::sm90

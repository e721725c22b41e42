// Which SID-MLP++ encoders the sm90 kernel takes, how a batch chooses its clusters, and how the
// kernel lies in shared memory. Plain C++.
#pragma once

#include <climits>
#include <cstdint>

#include "sidmlp/mlp_encoder_view.h"

namespace sidmlp::cuda::sm90 {

constexpr int kMlpThreads = 512;
constexpr int kMlpWarps = kMlpThreads / 32;
constexpr int kMlpTileRows = 16;             // rows of a tensor core tile
constexpr int kMlpMaxTiles = 6;              // tiles of rows that pass through a layer together
constexpr int kMlpMaxRequests = 16;          // of a group: one tile of means
constexpr int kMlpStateBytes = 3072;         // of MlpState, before all else in shared memory
constexpr int kMlpSharedBytes = 227 * 1024;  // of a block
constexpr int kMlpShareBytes = 4 * 4096;     // numbers of tokens while requests are shared out
constexpr int64_t kMlpMaxWidth = 1 << 16;    // keeps byte offsets in 32 bits

// Blocks of a cluster take roles r with r % cluster == rank, whole rows of them: no sum is cut, so
// every form has the same bits.
struct MlpFormRow {
  int64_t most_requests;  // a batch of at most so many takes the form
  int cluster;
  const char* reason;
};
// Measured by hand on an H200 with bf16, 4 layers, 4 roles, D 128, H 512, 2026-11-22; microseconds
// of a graph replay with 82 tokens each (tokens of mean 34).
constexpr MlpFormRow kMlpForms[] = {
    {64, 4,
     "a block a role: batch 1: 79 (66), two blocks 140 (115); batch 64: 144 (91), 147 (133)"},
    {INT64_MAX, 2,
     "a block two of four roles; batch 128: 198 (157), four blocks 231 (125), one 277 (244); batch "
     "4096: 4,425, one 4,494"},
};

// Blocks that share requests: at most one for each role.
constexpr int mlp_cluster(int form, int64_t batch, int num_roles) {
  int cluster = form;
  if (form == 0) {
    for (const MlpFormRow& row : kMlpForms)
      if (cluster == 0 && batch <= row.most_requests) cluster = row.cluster;
  }
  while (cluster > 1 && cluster / 2 >= num_roles) cluster /= 2;
  return cluster;
}

struct MlpSizesOf {
  bool half;  // bf16 or fp16 weights
  int dim, layers, roles, hidden_dim;
};

struct MlpShape {
  int cluster;   // blocks that share requests
  int clusters;  // of the launch
  int tiles;     // of rows at once, 0: nothing fits
  int slots;     // requests of a group
  int dim_pad, hidden_pad;
  int x_bytes, hidden_bytes;  // of a row in shared memory; odd multiples of 16: no bank conflicts
  int x, hidden, means, mean_hidden,
      vectors;  // byte offsets into dynamic shared memory, after MlpState
  int shared_bytes;
  int most_rows;  // of a group, in one block
  // Byte offsets into the workspace: of a block, then of a cluster.
  int64_t rows_at, block_bytes, sums_at, cluster_bytes, workspace_bytes;
};

constexpr int mlp_padded(int n) { return (n + 15) / 16 * 16; }

// Fills what depends on the sizes alone, with the most rows, then the most requests at once.
constexpr MlpShape mlp_block(const MlpSizesOf& sizes) {
  MlpShape s{};
  const int64_t element = sizes.half ? 2 : 4;
  s.dim_pad = mlp_padded(sizes.dim);
  s.hidden_pad = mlp_padded(sizes.hidden_dim);
  s.x_bytes = static_cast<int>(element * s.dim_pad + 16);
  s.hidden_bytes = static_cast<int>(element * s.hidden_pad + 16);
  // Many requests in a group are worth more than many rows at once only while those are few.
  constexpr int kChoices[][3] = {{kMlpMaxRequests, kMlpMaxTiles, 3},
                                 {4, kMlpMaxTiles, 2},
                                 {1, kMlpMaxTiles, 1}};  // slots, tiles from, down to
  for (const auto& choice : kChoices) {
    for (int tiles = choice[1]; tiles >= choice[2]; --tiles) {
      const int64_t rows = kMlpTileRows * tiles;
      const int64_t x = 0, hidden = x + rows * s.x_bytes;
      const int64_t means = hidden + rows * s.hidden_bytes;
      const int64_t mean_hidden = means + int64_t{kMlpTileRows} * s.x_bytes;
      const int64_t vectors = mean_hidden + int64_t{4} * choice[0] * s.hidden_pad;
      int64_t all = vectors + int64_t{8} * s.hidden_pad + int64_t{4} * s.dim_pad;
      if (all < kMlpShareBytes) all = kMlpShareBytes;
      all += kMlpStateBytes;
      if (all > kMlpSharedBytes) continue;
      s.tiles = tiles, s.slots = choice[0];
      s.x = static_cast<int>(x), s.hidden = static_cast<int>(hidden);
      s.means = static_cast<int>(means), s.mean_hidden = static_cast<int>(mean_hidden);
      s.vectors = static_cast<int>(vectors);
      s.shared_bytes = static_cast<int>(all);
      return s;
    }
  }
  return s;
}

// Why the kernel does not take these sizes; nullptr when it does.
constexpr const char* why_not(const MlpSizesOf& sizes) {
  if (sizes.layers < 1 || sizes.layers > kMaxEncoderLayers) return "num_layers: expected 1 .. 8";
  if (sizes.roles < 1 || sizes.roles > kMaxLevels) return "num_roles: expected 1 .. 8";
  if (sizes.dim < 1 || sizes.hidden_dim < 1) return "dim and hidden_dim: expected at least 1";
  if (sizes.dim > kMlpMaxWidth || sizes.hidden_dim > kMlpMaxWidth || mlp_block(sizes).tiles == 0)
    return "dim and hidden_dim: 16 rows of states and hidden activations do not fit in shared "
           "memory (half precision up to dim 512 with hidden_dim 4096, float32 up to 2048)";
  return nullptr;
}

}  // namespace sidmlp::cuda::sm90

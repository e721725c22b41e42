// Where the scratch arrays of one thread block lie. Sizes are data, so nothing is a fixed array:
// the host lays arrays out once per call, in shared memory while they fit, the rest in the block's
// slice of a global workspace. Placement never changes a result, only its speed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "sidmlp/views.h"

namespace sidmlp::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kMaxChunk = 16;  // beams whose heads are computed together

// Two blocks share a multiprocessor of compute capability 9.0: 228 KB, of which each block loses
// 1 KB to the system and about 1 KB to fixed variables.
constexpr int64_t kSharedBytes = 110 * 1024;
constexpr int kOneBlock = 227 * 1024;  // of a multiprocessor that one block may have

constexpr int round_up(int64_t n, int multiple) {
  return static_cast<int>((n + multiple - 1) / multiple * multiple);
}

struct Slot {
  int64_t offset;  // bytes
  bool shared;     // in shared memory, else in the workspace slice
};

// Hands out slots in the order of `take`; `mark` and `rewind` let arrays that do not live at the
// same time share memory.
class LayoutBuilder {
 public:
  struct Mark {
    int64_t shared, workspace;
  };

  template <class T>
  Slot take(int64_t count) {
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    const bool fits = used_.shared + bytes <= kSharedBytes;
    int64_t& used = fits ? used_.shared : used_.workspace;
    const Slot slot{used, fits};
    used += bytes;
    peak_.shared = std::max(peak_.shared, used_.shared);
    peak_.workspace = std::max(peak_.workspace, used_.workspace);
    return slot;
  }
  Mark mark() const { return used_; }
  void rewind(const Mark& mark) { used_ = mark; }
  Mark peak() const { return peak_; }

 private:
  Mark used_{0, 0};
  Mark peak_{0, 0};
};

// Bytes that a block needs.
struct Footprint {
  int64_t shared;
  int64_t workspace;
};

// csrc/cuda/readout.cuh. Dp, dp, Fp, Tp: padded sizes (sidmlp/views.h).
struct ReadoutLayout {
  Slot valid;      // int32 [T]: the valid tokens
  Slot weights;    // float [heads, Tp]: ones for the mean, then attention weights
  Slot mean;       // float [Dp]
  Slot query;      // float [Dp]
  Slot sum;        // float [Dp]: q + a, then u
  Slot folded;     // float [heads, dp]: W_q,h q, then [heads, d]: W_v,h y_h
  Slot head_rows;  // float [heads, Dp]: r_h, then y_h
  Slot hidden;     // float [Fp]
};

// csrc/cuda/heads.cuh
struct HeadsLayout {
  int chunk;    // beams that are computed together, 1..kMaxChunk
  Slot hidden;  // float [chunk, Hp]
  Slot next;    // float [chunk, Hp]; only with further blocks
};

struct BeamsLayout {
  Slot score;  // float [num_beams]
  Slot node;   // int32 [num_beams]
  Slot codes;  // int16 [num_beams, L]
};

struct BeamDecodeLayout {
  Footprint footprint;
  Slot partial;  // float4 [kPartialVectors], scratch of row_products
  Slot context;  // float [Dp]
  ReadoutLayout readout;
  Slot first;  // float [L * Hp]: context part of every head's first layer
  HeadsLayout heads;
  BeamsLayout beams[2];    // of this level and of the next
  Slot first_child;        // int32 [num_beams]
  Slot children;           // int32 [num_beams]: how many; at the end how many items to emit
  Slot active;             // int32 [num_beams]: ranks of beams that need a head
  Slot keys;               // BeamKey [key_capacity]
  int key_capacity;        // a power of two
  Slot logits;             // float [logit_capacity]
  int64_t logit_capacity;  // a multiple of 4, at least every C_l
};

struct ContextReadoutLayout {
  Footprint footprint;
  Slot partial;
  Slot context;  // float [Dp]
  ReadoutLayout readout;
};

struct LevelLogitsLayout {
  Footprint footprint;
  Slot partial;
  Slot first;  // float [Hp]
  HeadsLayout heads;
};

constexpr int kPartialRows = 4;  // rows that share a weight in row_products
constexpr int64_t kPartialVectors = static_cast<int64_t>(kThreads) * kPartialRows;

inline int64_t partial_floats() { return 4 * kPartialVectors; }

inline ReadoutLayout readout_layout(const ReadoutView& readout, int tokens,
                                    LayoutBuilder& builder) {
  const int64_t dim_pad = padded(readout.dim), heads = readout.num_heads;
  ReadoutLayout layout{};
  layout.mean = builder.take<float>(dim_pad);
  layout.query = builder.take<float>(dim_pad);
  layout.sum = builder.take<float>(dim_pad);
  layout.valid = builder.take<int32_t>(tokens);
  layout.hidden = builder.take<float>(padded(readout.ffn_dim));
  layout.folded = builder.take<float>(heads * padded(readout.head_dim));
  layout.head_rows = builder.take<float>(heads * dim_pad);
  layout.weights = builder.take<float>(heads * padded(tokens));
  return layout;
}

inline HeadsLayout heads_layout(const HeadsView& heads, int64_t most_rows, LayoutBuilder& builder) {
  constexpr int64_t kChunkBytes = 48 * 1024;
  const int64_t hidden_pad = padded(heads.hidden_dim), buffers = heads.num_blocks > 1 ? 2 : 1;
  const int64_t row_bytes = hidden_pad * static_cast<int64_t>(sizeof(float)) * buffers;
  HeadsLayout layout{};
  layout.chunk = static_cast<int>(
      std::min<int64_t>(most_rows, std::clamp<int64_t>(kChunkBytes / row_bytes, 1, kMaxChunk)));
  layout.hidden = builder.take<float>(layout.chunk * hidden_pad);
  if (buffers == 2) layout.next = builder.take<float>(layout.chunk * hidden_pad);
  return layout;
}

inline Footprint footprint_of(const LayoutBuilder& builder) {
  return {builder.peak().shared, builder.peak().workspace};
}

}  // namespace sidmlp::cuda

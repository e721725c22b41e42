// torch.ops.sidmlp.encode_* and recommend on the CPU: checks, the output, and threads over blocks
// of requests or, where there are too few of them, over the rows of a block.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "cpu/kernels.h"
#include "cpu/token_rows.h"
#include "torch/cpu_calls.h"
#include "torch/cpu_threads.h"
#include "torch/encoder_problem.h"

namespace sidmlp::torch_ops {

namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// Rows that a thread computes at a time: weights come from the last-level cache once for them, and
// what they hold stays in the second-level one.
constexpr int64_t kBlockRows = 96;
// Rows of a register tile of the widest instruction set: threads share a block in multiples of it.
constexpr int64_t kRowUnit = 6;

// An encoder as the loops below see it: stages, with all rows of one before any of the next.
struct T5Stages {
  const cpu::Kernels& kernels;
  const cpu::T5Panels& view;
  void* states;

  using Work = cpu::T5Work;
  int num_roles() const { return 0; }
  int last_stage() const { return view.num_layers; }
  size_t work_bytes(const cpu::TokenRows& rows) const { return cpu::t5_work_bytes(view, rows); }
  Work work(const cpu::TokenRows& rows, cpu::Arena& arena) const {
    return cpu::t5_work(view, rows, arena);
  }
  size_t scratch_bytes(const cpu::TokenRows& rows) const {
    return cpu::t5_scratch_bytes(view, rows);
  }
  void run(const cpu::TokenRows& rows, const Work& work, int stage, int64_t begin, int64_t end,
           cpu::Arena& arena) const {
    kernels.encode_t5(view, rows, work, stage, begin, end, states, arena);
  }
};

struct MlpStages {
  const cpu::Kernels& kernels;
  const cpu::MlpPanels& view;
  void* states;

  using Work = cpu::MlpWork;
  int num_roles() const { return view.num_roles; }
  int last_stage() const { return view.num_layers; }
  size_t work_bytes(const cpu::TokenRows& rows) const { return cpu::mlp_work_bytes(view, rows); }
  Work work(const cpu::TokenRows& rows, cpu::Arena& arena) const {
    return cpu::mlp_work(view, rows, arena);
  }
  size_t scratch_bytes(const cpu::TokenRows& rows) const {
    return cpu::mlp_scratch_bytes(view, rows);
  }
  void run(const cpu::TokenRows& rows, const Work& work, int stage, int64_t begin, int64_t end,
           cpu::Arena& arena) const {
    kernels.encode_mlp(view, rows, work, stage, begin, end, states, arena);
  }
};

// Each thread takes whole blocks.
template <class Stages>
void encode_blocks(const Stages& stages, const TokensView& tokens,
                   const std::vector<int64_t>& counts, const std::vector<int64_t>& blocks) {
  for_each_item(static_cast<int64_t>(blocks.size()) - 1, [&](int64_t i, cpu::Arena& arena) {
    const cpu::RowTable table(tokens, counts, blocks[i], blocks[i + 1], stages.num_roles());
    const cpu::TokenRows rows = table.view();
    if (rows.count == 0) return;
    arena.reset(stages.work_bytes(rows) + stages.scratch_bytes(rows));
    const typename Stages::Work work = stages.work(rows, arena);
    const size_t mark = arena.mark();
    for (int stage = 0; stage <= stages.last_stage(); ++stage) {
      arena.release(mark);
      stages.run(rows, work, stage, 0, rows.count, arena);
    }
  });
}

// All threads share the rows of one block.
template <class Stages>
void encode_block_together(const Stages& stages, const TokensView& tokens,
                           const std::vector<int64_t>& counts, int64_t begin, int64_t end) {
  const cpu::RowTable table(tokens, counts, begin, end, stages.num_roles());
  const cpu::TokenRows rows = table.view();
  if (rows.count == 0) return;
  static thread_local cpu::Arena shared;
  shared.reset(stages.work_bytes(rows));
  const typename Stages::Work work = stages.work(rows, shared);
  const int64_t units = (rows.count + kRowUnit - 1) / kRowUnit;
  const int64_t parts = std::min(units, num_threads());
  for (int stage = 0; stage <= stages.last_stage(); ++stage) {
    for_each_item(parts, [&](int64_t i, cpu::Arena& arena) {
      const int64_t first = units * i / parts * kRowUnit;
      const int64_t last = std::min(units * (i + 1) / parts * kRowUnit, rows.count);
      arena.reset(stages.scratch_bytes(rows));
      stages.run(rows, work, stage, first, last, arena);
    });
  }
}

// States of masked tokens are zero; those of a request with an unknown id are not numbers, so that
// a decode of them finds nothing.
void fill_unread(const TokensView& tokens, const std::vector<int64_t>& counts, int64_t row_bytes,
                 DType dtype, void* states) {
  auto* bytes = static_cast<char*>(states);
  for (int64_t b = 0; b < tokens.batch; ++b) {
    if (counts[b] == tokens.tokens) continue;
    for (int64_t at = b * tokens.tokens; at < (b + 1) * tokens.tokens; ++at) {
      char* row = bytes + at * row_bytes;
      if (!tokens.mask[at]) {
        std::fill(row, row + row_bytes, char{0});
      } else if (counts[b] < 0 && dtype == DType::kFloat32) {
        std::fill_n(reinterpret_cast<float*>(row), row_bytes / 4,
                    std::numeric_limits<float>::quiet_NaN());
      } else if (counts[b] < 0) {
        const uint16_t nan = dtype == DType::kBFloat16 ? 0x7fc0 : 0x7e00;
        std::fill_n(reinterpret_cast<uint16_t*>(row), row_bytes / 2, nan);
      }
    }
  }
}

template <class Stages>
void encode(const Stages& stages, const TokensView& tokens, int64_t vocab_size, int64_t dim,
            DType dtype) {
  const std::vector<int64_t> counts = cpu::count_tokens(tokens, vocab_size);
  fill_unread(tokens, counts, dim * (dtype == DType::kFloat32 ? 4 : 2), dtype, stages.states);
  const int64_t threads = num_threads();
  std::vector<int64_t> blocks = cpu::cut_blocks(counts, kBlockRows);
  if (threads == 1 || static_cast<int64_t>(blocks.size()) - 1 >= 2 * threads)
    return encode_blocks(stages, tokens, counts, blocks);
  blocks = cpu::cut_blocks(counts, 2 * threads * kBlockRows);
  for (size_t i = 0; i + 1 < blocks.size(); ++i)
    encode_block_together(stages, tokens, counts, blocks[i], blocks[i + 1]);
}

Tensor encode_t5(Tensor ids, Tensor mask, Tensors encoder, Ints sizes, double layer_norm_eps,
                 int64_t form, int64_t isa) {
  const Place place(ids);
  const T5Sizes s(sizes);
  const TokensView tokens = tokens_view(ids, mask, place);
  const cpu::T5Panels view = t5_panels(s, encoder, layer_norm_eps, place);
  check_form(form);
  const cpu::Kernels& kernels = kernels_of(isa);
  Tensor states =
      torch::stable::empty({tokens.batch, tokens.tokens, s.dim}, scalar_type_of(view.dtype));
  encode(T5Stages{kernels, view, states.data_ptr()}, tokens, s.vocab_size, s.dim, view.dtype);
  return states;
}

Tensor encode_mlp(Tensor ids, Tensor mask, Tensors encoder, Ints sizes, double layer_norm_eps,
                  int64_t form, int64_t isa) {
  const Place place(ids);
  const MlpSizes s(sizes);
  const TokensView tokens = tokens_view(ids, mask, place);
  STD_TORCH_CHECK(tokens.tokens <= s.max_length, "ids: expected at most ", s.max_length,
                  " tokens, the positions of the encoder, got ", tokens.tokens);
  const cpu::MlpPanels view = mlp_panels(s, encoder, layer_norm_eps, place);
  check_form(form);
  const cpu::Kernels& kernels = kernels_of(isa);
  Tensor states =
      torch::stable::empty({tokens.batch, tokens.tokens, s.dim}, scalar_type_of(view.dtype));
  encode(MlpStages{kernels, view, states.data_ptr()}, tokens, s.vocab_size, s.dim, view.dtype);
  return states;
}

Results recommend(Tensor ids, Tensor mask, Tensors encoder, Ints encoder_sizes, double encoder_eps,
                  int64_t form, Tensors readout, Tensors heads, Tensors catalogue,
                  std::optional<Tensor> exclude_ids, std::optional<Tensor> exclude_offsets,
                  Ints sizes, double layer_norm_eps, int64_t k, int64_t num_beams, bool codebook,
                  std::vector<double> temperatures, std::vector<double> level_weights,
                  Ints level_modes, int64_t launches, int64_t isa) {
  STD_TORCH_CHECK(encoder_sizes.size() == 6 || encoder_sizes.size() == 8,
                  "encoder_sizes: expected 8 numbers (of encode_t5) or 6 (of encode_mlp), got ",
                  encoder_sizes.size());
  const Tensor states = encoder_sizes.size() == 8
                            ? encode_t5(ids, mask, encoder, encoder_sizes, encoder_eps, form, isa)
                            : encode_mlp(ids, mask, encoder, encoder_sizes, encoder_eps, form, isa);
  return decode_states_cpu(states, mask, readout, heads, catalogue, exclude_ids, exclude_offsets,
                           sizes, layer_norm_eps, k, num_beams, codebook, temperatures,
                           level_weights, level_modes, launches, isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidmlp, CPU, library) {
  library.impl("encode_t5", TORCH_BOX(&encode_t5));
  library.impl("encode_mlp", TORCH_BOX(&encode_mlp));
  library.impl("recommend", TORCH_BOX(&recommend));
}

}  // namespace sidmlp::torch_ops

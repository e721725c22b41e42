// torch.ops.sidmlp.* on the CPU: checks, outputs, threads over blocks of requests. Schemas live in
// sidmlp_kernels/ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cpu/kernels.h"
#include "torch/cpu_calls.h"
#include "torch/cpu_threads.h"
#include "torch/problem.h"

namespace sidmlp::torch_ops {

namespace {

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;
using OptionalTensor = std::optional<Tensor>;

Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype);
}

// Splits a batch so that every thread has work, in blocks of at most kMaxBlock requests, and runs
// body(begin, end, arena).
template <class Body>
void for_each_block(int64_t batch, size_t arena_bytes, const Body& body) {
  if (batch == 0) return;
  const int64_t threads = num_threads();
  // As many blocks as fill every thread equally often, none larger than kMaxBlock.
  const int64_t rounds = (batch + threads * cpu::kMaxBlock - 1) / (threads * cpu::kMaxBlock);
  const int64_t num_blocks = std::min(batch, rounds * threads);
  for_each_item(num_blocks, [&](int64_t i, cpu::Arena& arena) {
    arena.reset(arena_bytes);
    body(i * batch / num_blocks, (i + 1) * batch / num_blocks, arena);
  });
}

constexpr const char* kOneLaunch = "two launches are for tensor cores, this is the CPU";

// The exclusion offsets are read as array indices, so a bad one must not leave this function.
void check_offsets(const ExcludeView& exclude, int64_t batch, const OptionalTensor& ids) {
  if (exclude.offsets == nullptr) return;
  const int64_t total = ids->numel();
  bool ok = exclude.offsets[0] == 0 && exclude.offsets[batch] == total;
  for (int64_t b = 0; b < batch; ++b) ok = ok && exclude.offsets[b] <= exclude.offsets[b + 1];
  STD_TORCH_CHECK(ok, "exclude_offsets: expected to rise from 0 to ", total,
                  " (the number of exclude_ids)");
}

struct Outputs {
  Tensor items, scores, codes, counts;
  ResultView view;

  Outputs(int64_t batch, const DecodeConfig& config, int num_levels)
      : items(empty_cpu({batch, config.k}, ScalarType::Long)),
        scores(empty_cpu({batch, config.k}, ScalarType::Float)),
        codes(empty_cpu({batch, config.k, num_levels}, ScalarType::Int)),
        counts(empty_cpu({batch}, ScalarType::Int)),
        view{static_cast<int64_t*>(items.data_ptr()), static_cast<float*>(scores.data_ptr()),
             static_cast<int32_t*>(codes.data_ptr()), static_cast<int32_t*>(counts.data_ptr())} {}
  Results tuple() const { return {items, scores, codes, counts}; }
};

Results beam_decode(Tensor context, Tensors heads, Tensors catalogue, OptionalTensor exclude_ids,
                    OptionalTensor exclude_offsets, Ints sizes, double layer_norm_eps, int64_t k,
                    int64_t num_beams, bool codebook, Floats temperatures, Floats level_weights,
                    Ints level_modes, int64_t launches, int64_t isa) {
  const Place place(context);
  check_launches(launches, kOneLaunch);
  const Sizes s(sizes);
  STD_TORCH_CHECK(context.dim() == 2, "context: expected [batch, dim], got ",
                  shape_text(shape_of(context)));
  const int64_t batch = context.size(0);
  const auto* rows = check_as<float>(context, "context", ScalarType::Float, {batch, s.dim}, place);
  const HeadsView heads_v = heads_view(s, heads, layer_norm_eps, place);
  const TrieView trie = trie_view(s, catalogue, place);
  const DecodeConfig config =
      decode_config(s, k, num_beams, codebook, temperatures, level_weights, level_modes);
  const ExcludeView exclude = exclude_view(exclude_ids, exclude_offsets, batch, place);
  check_offsets(exclude, batch, exclude_ids);
  const cpu::Kernels& kernels = kernels_of(isa);
  Outputs out(batch, config, s.num_levels);
  for_each_block(batch, cpu::beam_decode_bytes(heads_v, trie, config),
                 [&](int64_t begin, int64_t end, cpu::Arena& arena) {
                   kernels.beam_decode(heads_v, trie, config, exclude, begin, end,
                                       rows + begin * s.dim, s.dim, out.view, arena);
                 });
  return out.tuple();
}

}  // namespace

Results decode_states_cpu(Tensor states, Tensor mask, Tensors readout, Tensors heads,
                          Tensors catalogue, OptionalTensor exclude_ids,
                          OptionalTensor exclude_offsets, Ints sizes, double layer_norm_eps,
                          int64_t k, int64_t num_beams, bool codebook, Floats temperatures,
                          Floats level_weights, Ints level_modes, int64_t launches, int64_t isa) {
  const Place place(states);
  check_launches(launches, kOneLaunch);
  const Sizes s(sizes);
  const StatesView states_v = states_view(s, states, mask, place);
  const int64_t batch = states.size(0);
  const ReadoutView readout_v = readout_view(s, readout, layer_norm_eps, place);
  const HeadsView heads_v = heads_view(s, heads, layer_norm_eps, place);
  const TrieView trie = trie_view(s, catalogue, place);
  const DecodeConfig config =
      decode_config(s, k, num_beams, codebook, temperatures, level_weights, level_modes);
  const ExcludeView exclude = exclude_view(exclude_ids, exclude_offsets, batch, place);
  check_offsets(exclude, batch, exclude_ids);
  const cpu::Kernels& kernels = kernels_of(isa);
  Outputs out(batch, config, s.num_levels);
  const size_t context_bytes =
      cpu::arena_bytes(static_cast<size_t>(cpu::kMaxBlock) * s.dim * sizeof(float));
  const size_t bytes = context_bytes + cpu::context_readout_bytes(readout_v, states_v.tokens) +
                       cpu::beam_decode_bytes(heads_v, trie, config);
  for_each_block(batch, bytes, [&](int64_t begin, int64_t end, cpu::Arena& arena) {
    auto* context = static_cast<float*>(arena.take(context_bytes));
    kernels.context_readout(readout_v, states_v, begin, end, context, s.dim, arena);
    kernels.beam_decode(heads_v, trie, config, exclude, begin, end, context, s.dim, out.view,
                        arena);
  });
  return out.tuple();
}

namespace {

Tensor context_readout(Tensor states, Tensor mask, Tensors readout, Ints sizes,
                       double layer_norm_eps, int64_t isa) {
  const Place place(states);
  const Sizes s(sizes);
  const StatesView states_v = states_view(s, states, mask, place);
  const ReadoutView readout_v = readout_view(s, readout, layer_norm_eps, place);
  const cpu::Kernels& kernels = kernels_of(isa);
  const int64_t batch = states.size(0);
  Tensor context = empty_cpu({batch, s.dim}, ScalarType::Float);
  auto* rows = static_cast<float*>(context.data_ptr());
  for_each_block(batch, cpu::context_readout_bytes(readout_v, states_v.tokens),
                 [&](int64_t begin, int64_t end, cpu::Arena& arena) {
                   kernels.context_readout(readout_v, states_v, begin, end, rows + begin * s.dim,
                                           s.dim, arena);
                 });
  return context;
}

Tensor level_logits(Tensor context, Tensor prefix_codes, Tensors heads, Ints sizes,
                    double layer_norm_eps, int64_t isa) {
  const Place place(context);
  const Sizes s(sizes);
  STD_TORCH_CHECK(context.dim() == 2 && prefix_codes.dim() == 2,
                  "context and prefix_codes: expected [rows, dim] and [rows, level], got ",
                  shape_text(shape_of(context)), " and ", shape_text(shape_of(prefix_codes)));
  const int64_t rows = context.size(0), level = prefix_codes.size(1);
  STD_TORCH_CHECK(level < s.num_levels, "prefix_codes: expected at most ", s.num_levels - 1,
                  " codes a row, got ", level);
  const auto* context_rows =
      check_as<float>(context, "context", ScalarType::Float, {rows, s.dim}, place);
  const auto* codes =
      check_as<int32_t>(prefix_codes, "prefix_codes", ScalarType::Int, {rows, level}, place);
  for (int64_t i = 0; i < rows * level; ++i) {
    const int limit = s.num_codes[i % level];
    STD_TORCH_CHECK(codes[i] >= 0 && codes[i] < limit, "prefix_codes: expected codes 0..",
                    limit - 1, " at level ", i % level + 1, ", got ", codes[i], " in row ",
                    i / level);
  }
  const HeadsView heads_v = heads_view(s, heads, layer_norm_eps, place);
  const cpu::Kernels& kernels = kernels_of(isa);
  const int width = s.num_codes[level];
  Tensor logits = empty_cpu({rows, width}, ScalarType::Float);
  auto* out = static_cast<float*>(logits.data_ptr());
  for_each_block(rows, cpu::level_logits_bytes(heads_v, static_cast<int>(level)),
                 [&](int64_t begin, int64_t end, cpu::Arena& arena) {
                   kernels.level_logits(heads_v, static_cast<int>(level), end - begin,
                                        context_rows + begin * s.dim, s.dim, codes + begin * level,
                                        out + begin * width, arena);
                 });
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidmlp, CPU, library) {
  library.impl("beam_decode", TORCH_BOX(&beam_decode));
  library.impl("decode_states", TORCH_BOX(&decode_states_cpu));
  library.impl("context_readout", TORCH_BOX(&context_readout));
  library.impl("level_logits", TORCH_BOX(&level_logits));
}

}  // namespace sidmlp::torch_ops

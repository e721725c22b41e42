// torch.ops.sidmlp.* on CUDA: checks, outputs and workspace from torch's caching allocator, one
// launch (of a decode two where it is asked for them) on the current stream of the tensors' device.
// Never synchronises. Schemas live in sidmlp_kernels/ops.
#include <torch/csrc/stable/library.h>

#include <climits>
#include <tuple>

#include "cuda/launch.h"
#include "torch/cuda_call.h"
#include "torch/problem.h"

namespace sidmlp::torch_ops {

namespace {

using torch::stable::accelerator::DeviceGuard;

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;
using OptionalTensor = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Widths that a kernel counts in 32 bits.
void check_readout_widths(const Sizes& s) {
  const int64_t widest = s.num_heads * std::max(padded(s.dim), padded(s.head_dim));
  STD_TORCH_CHECK(widest <= INT_MAX, "num_heads: expected num_heads * dim below 2147483648, got ",
                  widest);
}

// Prepares and launches `op` on the current stream; the guard has made the device current.
template <class Op>
void run(Op& op, const Place& place, const char* name) {
  check_cuda(cuda::prepare(op), name);
  std::optional<Tensor> workspace;  // freed on return: the allocator keeps the stream's order
  if (op.shape.workspace_bytes > 0)
    workspace = empty_cuda({op.shape.workspace_bytes}, ScalarType::Byte, place);
  check_cuda(cuda::launch(op, workspace ? workspace->data_ptr() : nullptr, current_stream(place)),
             name);
}

Results decode(cuda::BeamDecode& op, const Sizes& s, const Tensors& heads, const Tensors& catalogue,
               const OptionalTensor& exclude_ids, const OptionalTensor& exclude_offsets,
               double layer_norm_eps, int64_t k, int64_t num_beams, bool codebook,
               const Floats& temperatures, const Floats& level_weights, const Ints& level_modes,
               int64_t launches, const Place& place, const char* name) {
  cuda::BeamDecodeProblem& problem = op.problem;
  const int64_t batch = problem.batch;
  problem.heads = heads_view(s, heads, layer_norm_eps, place);
  STD_TORCH_CHECK(
      problem.context != nullptr || batch == 0 || problem.heads.dtype == problem.readout.dtype,
      "heads: expected matrices of the readout's dtype, got another; pack both at once");
  check_aligned(heads, "heads");
  problem.trie = trie_view(s, catalogue, place);
  problem.config =
      decode_config(s, k, num_beams, codebook, temperatures, level_weights, level_modes);
  problem.exclude = exclude_view(exclude_ids, exclude_offsets, batch, place);
  problem.num_excluded = exclude_ids ? exclude_ids->numel() : 0;
  check_launches(launches, launches == 2 ? cuda::sm90::two_launches_why_not(problem) : nullptr);
  op.launches = static_cast<int>(launches);

  Tensor items = empty_cuda({batch, k}, ScalarType::Long, place);
  Tensor scores = empty_cuda({batch, k}, ScalarType::Float, place);
  Tensor codes = empty_cuda({batch, k, s.num_levels}, ScalarType::Int, place);
  Tensor counts = empty_cuda({batch}, ScalarType::Int, place);
  problem.result = {static_cast<int64_t*>(items.data_ptr()), static_cast<float*>(scores.data_ptr()),
                    static_cast<int32_t*>(codes.data_ptr()),
                    static_cast<int32_t*>(counts.data_ptr())};
  if (batch > 0) run(op, place, name);
  return {items, scores, codes, counts};
}

Results beam_decode(Tensor context, Tensors heads, Tensors catalogue, OptionalTensor exclude_ids,
                    OptionalTensor exclude_offsets, Ints sizes, double layer_norm_eps, int64_t k,
                    int64_t num_beams, bool codebook, Floats temperatures, Floats level_weights,
                    Ints level_modes, int64_t launches, int64_t /*isa*/) {
  const Place place = cuda_place(context, "context");
  const DeviceGuard guard(place.device_index);
  const Sizes s(sizes);
  STD_TORCH_CHECK(context.dim() == 2, "context: expected [batch, dim], got ",
                  shape_text(shape_of(context)));
  cuda::BeamDecode op{};
  op.problem.batch = context.size(0);
  op.problem.context =
      check_as<float>(context, "context", ScalarType::Float, {op.problem.batch, s.dim}, place);
  return decode(op, s, heads, catalogue, exclude_ids, exclude_offsets, layer_norm_eps, k, num_beams,
                codebook, temperatures, level_weights, level_modes, launches, place, "beam_decode");
}

Results decode_states(Tensor states, Tensor mask, Tensors readout, Tensors heads, Tensors catalogue,
                      OptionalTensor exclude_ids, OptionalTensor exclude_offsets, Ints sizes,
                      double layer_norm_eps, int64_t k, int64_t num_beams, bool codebook,
                      Floats temperatures, Floats level_weights, Ints level_modes, int64_t launches,
                      int64_t /*isa*/) {
  const Place place = cuda_place(states, "states");
  const DeviceGuard guard(place.device_index);
  const Sizes s(sizes);
  cuda::BeamDecode op{};
  op.problem.states = states_view(s, states, mask, place);
  op.problem.batch = states.size(0);
  op.problem.readout = readout_view(s, readout, layer_norm_eps, place);
  check_aligned(readout, "readout");
  check_readout_widths(s);
  return decode(op, s, heads, catalogue, exclude_ids, exclude_offsets, layer_norm_eps, k, num_beams,
                codebook, temperatures, level_weights, level_modes, launches, place,
                "decode_states");
}

Tensor context_readout(Tensor states, Tensor mask, Tensors readout, Ints sizes,
                       double layer_norm_eps, int64_t /*isa*/) {
  const Place place = cuda_place(states, "states");
  const DeviceGuard guard(place.device_index);
  const Sizes s(sizes);
  cuda::ContextReadout op{};
  op.problem.states = states_view(s, states, mask, place);
  op.problem.batch = states.size(0);
  op.problem.readout = readout_view(s, readout, layer_norm_eps, place);
  check_aligned(readout, "readout");
  check_readout_widths(s);
  Tensor context = empty_cuda({op.problem.batch, s.dim}, ScalarType::Float, place);
  op.problem.context = static_cast<float*>(context.data_ptr());
  if (op.problem.batch > 0) run(op, place, "context_readout");
  return context;
}

Tensor level_logits(Tensor context, Tensor prefix_codes, Tensors heads, Ints sizes,
                    double layer_norm_eps, int64_t /*isa*/) {
  const Place place = cuda_place(context, "context");
  const DeviceGuard guard(place.device_index);
  const Sizes s(sizes);
  STD_TORCH_CHECK(context.dim() == 2 && prefix_codes.dim() == 2,
                  "context and prefix_codes: expected [rows, dim] and [rows, level], got ",
                  shape_text(shape_of(context)), " and ", shape_text(shape_of(prefix_codes)));
  const int64_t rows = context.size(0), level = prefix_codes.size(1);
  STD_TORCH_CHECK(level < s.num_levels, "prefix_codes: expected at most ", s.num_levels - 1,
                  " codes a row, got ", level);
  cuda::LevelLogits op{};
  op.problem.rows = rows;
  op.problem.level = static_cast<int>(level);
  op.problem.context = check_as<float>(context, "context", ScalarType::Float, {rows, s.dim}, place);
  op.problem.prefix_codes =
      check_as<int32_t>(prefix_codes, "prefix_codes", ScalarType::Int, {rows, level}, place);
  op.problem.heads = heads_view(s, heads, layer_norm_eps, place);
  check_aligned(heads, "heads");
  Tensor logits = empty_cuda({rows, s.num_codes[level]}, ScalarType::Float, place);
  op.problem.logits = static_cast<float*>(logits.data_ptr());
  if (rows > 0) run(op, place, "level_logits");
  return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidmlp, CUDA, library) {
  library.impl("beam_decode", TORCH_BOX(&beam_decode));
  library.impl("decode_states", TORCH_BOX(&decode_states));
  library.impl("context_readout", TORCH_BOX(&context_readout));
  library.impl("level_logits", TORCH_BOX(&level_logits));
}

}  // namespace sidmlp::torch_ops

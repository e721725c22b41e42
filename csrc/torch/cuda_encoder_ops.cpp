// torch.ops.sidmlp.encode_t5 on CUDA: checks, states and workspace from torch's caching allocator,
// one launch on the current stream. Never synchronises.
#include <torch/csrc/stable/library.h>

#include "cuda/sm90/encoder/encode_t5.h"
#include "torch/cuda_call.h"
#include "torch/encoder_problem.h"

namespace sidmlp::torch_ops {

namespace {

Tensor encode_t5(Tensor ids, Tensor mask, std::vector<Tensor> encoder, std::vector<int64_t> sizes,
                 double layer_norm_eps, int64_t form, int64_t /*isa*/) {
  const Place place = cuda_place(ids, "ids");
  const torch::stable::accelerator::DeviceGuard guard(place.device_index);
  const T5Sizes s(sizes);
  cuda::sm90::EncodeT5Problem problem{};
  problem.tokens = tokens_view(ids, mask, place);
  problem.model = t5_view(s, encoder, layer_norm_eps, place);
  check_aligned(encoder, "encoder");
  check_form(form);
  const ScalarType dtype = scalar_type_of(problem.model.dtype);
  Tensor states = empty_cuda({problem.tokens.batch, problem.tokens.tokens, s.dim}, dtype, place);
  if (problem.tokens.batch == 0 || problem.tokens.tokens == 0) return states;
  problem.states = states.data_ptr();
  const char* reason = cuda::sm90::why_not(problem);
  STD_TORCH_CHECK(reason == nullptr, "encode_t5: expected sizes that its CUDA kernel takes, got ",
                  reason);
  const auto chosen = static_cast<cuda::sm90::EncodeForm>(form);
  const int64_t bytes = cuda::sm90::workspace_bytes(problem, chosen);
  std::optional<Tensor> workspace;  // freed on return: the allocator keeps the stream's order
  if (bytes > 0) workspace = empty_cuda({bytes}, ScalarType::Byte, place);
  check_cuda(cuda::sm90::launch(problem, chosen, workspace ? workspace->data_ptr() : nullptr,
                                current_stream(place)),
             "encode_t5");
  return states;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidmlp, CUDA, library) {
  library.impl("encode_t5", TORCH_BOX(&encode_t5));
}

}  // namespace sidmlp::torch_ops

#include "cuda/sm90/mlp_encoder/encode_mlp.h"

#include <algorithm>

#include "cuda/cluster_launch.h"

namespace sidmlp::cuda::sm90 {

namespace {

MlpSizesOf sizes_of(const MlpView& m) {
  return {m.dtype != DType::kFloat32, m.dim, m.num_layers, m.num_roles, m.hidden_dim};
}

int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

const char* why_not(const EncodeMlpProblem& problem) {
  if (const char* reason = why_not(sizes_of(problem.model))) return reason;
  if (problem.tokens.tokens < 1) return "tokens: expected at least 1";
  if (problem.tokens.tokens > problem.model.max_length)
    return "tokens: more than the encoder has positions for";
  return nullptr;
}

MlpShape mlp_shape(const EncodeMlpProblem& problem, int form) {
  const MlpView& m = problem.model;
  MlpShape s = mlp_block(sizes_of(m));
  s.cluster = mlp_cluster(form, problem.tokens.batch, m.num_roles);
  // As many clusters as fit at once; those of eight and four leave some multiprocessors over.
  const int most = s.cluster == 8 ? 15 : s.cluster == 4 ? 30 : multiprocessors() / s.cluster;
  s.clusters = static_cast<int>(std::min<int64_t>(problem.tokens.batch, most));
  const int64_t tokens = problem.tokens.tokens;
  const int64_t own_roles = (m.num_roles + s.cluster - 1) / s.cluster;
  s.most_rows = static_cast<int>(
      std::max(tokens, std::min(own_roles * kMlpTileRows * s.tiles, s.slots * tokens)));
  s.rows_at = aligned(int64_t{4} * s.most_rows * s.dim_pad);
  s.block_bytes = s.rows_at + aligned(int64_t{8} * s.most_rows);
  s.sums_at = s.block_bytes * s.cluster * s.clusters;
  s.cluster_bytes = aligned(int64_t{2} * 4 * s.slots * m.num_roles * s.dim_pad);
  s.workspace_bytes = s.sums_at + s.cluster_bytes * s.clusters;
  return s;
}

cudaError_t launch(const EncodeMlpProblem& problem, int form, void* workspace,
                   cudaStream_t stream) {
  if (problem.tokens.batch == 0) return cudaSuccess;
  MlpShape shape = mlp_shape(problem, form);
  if (shape.tiles == 0) return cudaErrorInvalidValue;
  const DType dtype = problem.model.dtype;
  const void* kernel = dtype == DType::kBFloat16  ? encode_mlp_bf16()
                       : dtype == DType::kFloat16 ? encode_mlp_fp16()
                                                  : encode_mlp_fp32();
  void* arguments[] = {const_cast<EncodeMlpProblem*>(&problem), &shape, &workspace};
  return launch_kernel(kernel, arguments, shape.clusters * shape.cluster, kMlpThreads,
                       shape.cluster, shape.shared_bytes, stream, kMlpSharedBytes);
}

}  // namespace sidmlp::cuda::sm90

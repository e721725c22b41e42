#include "cuda/sm90/launch.h"

#include "cuda/cluster_launch.h"
#include "cuda/problem.h"
#include "cuda/sm90/kernels.h"

namespace sidmlp::cuda::sm90 {

namespace {

cudaError_t launch_clusters(const void* kernel, int cluster, int64_t blocks, int shared_bytes,
                            void** arguments, cudaStream_t stream, bool early = false) {
  return launch_kernel(kernel, arguments, static_cast<int>(blocks), kThreads, cluster, shared_bytes,
                       stream, kOneBlock - kFixed, early);
}

}  // namespace

cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, void* workspace,
                   cudaStream_t stream) {
  const int hidden = problem.heads.hidden_dim;
  const bool bf16 = problem.heads.dtype == DType::kBFloat16;
  const auto kernel_of = problem.context != nullptr
                             ? (bf16 ? beam_decode_bf16 : beam_decode_fp16)
                             : (bf16 ? decode_states_bf16 : decode_states_fp16);
  void* arguments[] = {const_cast<BeamDecodeProblem*>(&problem), const_cast<Shape*>(&shape),
                       &workspace};
  const void* kernel = shape.wide ? (bf16 ? decode_wide_bf16 : decode_wide_fp16)(hidden)
                                  : kernel_of(hidden, shape.resident);
  return launch_clusters(kernel, shape.cluster, num_blocks(problem, shape), shape.shared_bytes,
                         arguments, stream);
}

cudaError_t launch(const BeamDecodeProblem& problem, const FirstStageShape& first,
                   const Shape& levels, void* workspace, cudaStream_t stream) {
  const int hidden = problem.heads.hidden_dim;
  const bool bf16 = problem.heads.dtype == DType::kBFloat16, states = problem.context == nullptr;
  auto* given = const_cast<BeamDecodeProblem*>(&problem);
  void* first_arguments[] = {given, const_cast<FirstStageShape*>(&first), &workspace};
  const cudaError_t error = launch_clusters(
      bf16 ? first_stage_bf16(hidden, states) : first_stage_fp16(hidden, states),
      1 << first.cluster_shift, num_blocks(problem, first), first.bytes, first_arguments, stream);
  if (error != cudaSuccess) return error;
  void* arguments[] = {given, const_cast<Shape*>(&levels), &workspace};
  return launch_clusters(
      bf16 ? beam_decode_bf16(hidden, levels.resident) : beam_decode_fp16(hidden, levels.resident),
      levels.cluster, num_blocks(problem, levels), levels.shared_bytes, arguments, stream, true);
}

cudaError_t launch(const ContextReadoutProblem& problem, const ReadoutShape& shape,
                   cudaStream_t stream) {
  const bool bf16 = problem.readout.dtype == DType::kBFloat16;
  void* arguments[] = {const_cast<ContextReadoutProblem*>(&problem),
                       const_cast<ReadoutShape*>(&shape)};
  return launch_clusters(bf16 ? context_readout_bf16() : context_readout_fp16(),
                         1 << shape.cluster_shift, num_blocks(problem, shape), shape.bytes,
                         arguments, stream);
}

}  // namespace sidmlp::cuda::sm90

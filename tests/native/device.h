// The CUDA kernels of csrc/cuda on one problem. Results begin as garbage.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "cuda/launch.h"
#include "native/device_arrays.h"
#include "native/judge.h"

namespace sidmlp::native {

class CudaDecoder {
 public:
  explicit CudaDecoder(const Problem& problem)
      : problem_(problem), views_(views_of(problem, [this](const Array& array) {
          return arrays_.copy_of(array.bytes.data(), array.bytes.size());
        })) {}

  // Requests [first, first + batch). poison: the workspace begins as NaN; else it stays as it was
  // allocated, for initcheck to watch.
  Results decode(bool poison, int first, int batch, int launches = 1) const {
    const Case& s = problem_.sizes;
    cuda::BeamDecode op{};
    op.problem = decode_problem(first, batch);
    op.launches = launches;
    Results results(problem_);
    const size_t rows = static_cast<size_t>(batch) * s.k;
    results.items.resize(rows);
    results.scores.resize(rows);
    results.codes.resize(rows * problem_.num_levels());
    results.counts.resize(batch);
    DeviceArrays own;
    const int garbage = poison ? 0xff : 0x5a;
    op.problem.result = {
        static_cast<int64_t*>(own.filled(rows * sizeof(int64_t), garbage)),
        static_cast<float*>(own.filled(rows * sizeof(float), garbage)),
        static_cast<int32_t*>(own.filled(results.codes.size() * sizeof(int32_t), garbage)),
        static_cast<int32_t*>(own.filled(batch * sizeof(int32_t), garbage))};
    run(op, own, poison);
    copy_back(results.items, op.problem.result.items);
    copy_back(results.scores, op.problem.result.scores);
    copy_back(results.codes, op.problem.result.codes);
    copy_back(results.counts, op.problem.result.counts);
    return results;
  }

  bool takes_two_launches() const {
    return cuda::sm90::two_launches_why_not(decode_problem(0, 1)) == nullptr;
  }

  std::vector<float> contexts() const {
    cuda::ContextReadout op{};
    op.problem.batch = problem_.sizes.batch;
    op.problem.readout = views_.readout;
    op.problem.states = states_from(0);
    std::vector<float> context(static_cast<int64_t>(problem_.sizes.batch) * problem_.sizes.dim);
    DeviceArrays own;
    op.problem.context = static_cast<float*>(own.filled(context.size() * sizeof(float), 0xff));
    run(op, own, false);
    copy_back(context, op.problem.context);
    return context;
  }

  // [rows, C] for contexts [rows, D] and prefixes [rows, level].
  std::vector<float> logits(int level, const std::vector<float>& contexts,
                            const std::vector<int32_t>& prefixes) const {
    cuda::LevelLogits op{};
    op.problem.rows = static_cast<int64_t>(contexts.size()) / problem_.sizes.dim;
    op.problem.level = level;
    op.problem.heads = views_.heads;
    DeviceArrays own;
    op.problem.context =
        static_cast<const float*>(own.copy_of(contexts.data(), contexts.size() * sizeof(float)));
    op.problem.prefix_codes = static_cast<const int32_t*>(
        own.copy_of(prefixes.data(), prefixes.size() * sizeof(int32_t)));
    std::vector<float> logits(op.problem.rows * problem_.sizes.codes[level]);
    op.problem.logits = static_cast<float*>(own.filled(logits.size() * sizeof(float), 0xff));
    run(op, own, false);
    copy_back(logits, op.problem.logits);
    return logits;
  }

 private:
  // Without results.
  cuda::BeamDecodeProblem decode_problem(int first, int batch) const {
    cuda::BeamDecodeProblem decode{};
    decode.batch = batch;
    decode.heads = views_.heads;
    decode.trie = views_.trie;
    decode.config = problem_.config;
    decode.exclude = views_.exclude;
    if (views_.exclude.offsets != nullptr) decode.exclude.offsets += first;
    decode.num_excluded = problem_.num_excluded;
    if (problem_.from_states()) {
      decode.readout = views_.readout;
      decode.states = states_from(first);
    } else {
      decode.context = views_.context + static_cast<int64_t>(first) * problem_.sizes.dim;
    }
    return decode;
  }

  StatesView states_from(int first) const {
    StatesView view = views_.states;
    const int64_t tokens = static_cast<int64_t>(first) * view.tokens;
    const int64_t width = problem_.sizes.dim * (view.dtype == DType::kFloat32 ? 4 : 2);
    view.states = static_cast<const char*>(view.states) + tokens * width;
    view.mask += tokens;
    return view;
  }

  template <class Op>
  static void run(Op& op, DeviceArrays& own, bool poison) {
    check(cuda::prepare(op), "prepare");
    const auto bytes = static_cast<size_t>(op.shape.workspace_bytes);
    void* workspace = poison ? own.filled(bytes, 0xff) : own.allocate(bytes);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");  // the fills, before another stream
    check(cuda::launch(op, workspace, stream), "launch");
    check(cudaStreamSynchronize(stream), "kernel");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }

  const Problem& problem_;
  DeviceArrays arrays_;
  Views views_;
};

}  // namespace sidmlp::native

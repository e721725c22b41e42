// Microseconds of graph replays of the T5 encoder at the published sizes, every form.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cuda/sm90/encoder/encode_t5.h"
#include "native/device_arrays.h"
#include "native/encode_problem.h"

namespace sidmlp::native {

using cuda::sm90::EncodeForm;
using cuda::sm90::EncodeT5Problem;

constexpr EncodeForm kForms[] = {EncodeForm::kThroughput, EncodeForm::kCluster1,
                                 EncodeForm::kCluster2,   EncodeForm::kCluster4,
                                 EncodeForm::kCluster8,   EncodeForm::kLong};

inline bool takes(const T5View& model, EncodeForm form) {
  EncodeT5Problem problem{};
  problem.model = model, problem.tokens.tokens = 1;
  return why_not(problem, form) == nullptr;
}

inline float replay_time(const EncodeT5Problem& problem, EncodeForm form, void* workspace) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  cudaEvent_t begin, end;
  check(cudaStreamCreate(&stream), "stream");
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  check(launch(problem, form, workspace, stream), "launch");
  check(cudaStreamEndCapture(stream, &graph), "capture");
  check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  std::vector<float> times;
  const int64_t work = problem.tokens.batch * problem.tokens.tokens;
  const int replays = work > 100000 ? 5 : work > 10000 ? 20 : 50;
  for (int i = 0; i < 7; ++i) {
    check(cudaEventRecord(begin, stream), "record");
    for (int r = 0; r < replays; ++r) check(cudaGraphLaunch(exec, stream), "replay");
    check(cudaEventRecord(end, stream), "record");
    check(cudaEventSynchronize(end), "replays");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(1000 * ms / replays);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
  return times[times.size() / 2];
}

inline void time_all(int only_form, int only_batch) {
  for (const double mean : {0.0, 34.0}) {
    Case c;
    c.mask = mean > 0 ? Case::kPrefix : Case::kFull;
    const Model model(c, 3);
    DeviceArrays device;
    const T5View view = model.view(device);
    printf("%s\nbatch", mean > 0 ? "tokens of mean 34, at most 82" : "82 tokens each");
    for (const EncodeForm form : kForms) printf("  form %2d", static_cast<int>(form));
    printf("   microseconds of a graph replay\n");
    for (const int batch : {1, 15, 30, 32, 66, 128, 256, 512, 4096}) {
      if (only_batch != 0 && batch != only_batch) continue;
      DeviceArrays arrays;
      const Input in = random_input(c, model.vocab, batch, mean, 5);
      EncodeT5Problem problem{};
      problem.model = view;
      problem.tokens = {arrays.copy_of(in.ids), arrays.copy_of(in.mask), batch, c.tokens};
      problem.states = arrays.filled(in.mask.size() * c.dim * 2, 0xff);
      printf("%5d", batch);
      for (const EncodeForm form : kForms) {
        if ((only_form != 0 && static_cast<int>(form) != only_form) || !takes(view, form) ||
            (form != EncodeForm::kThroughput && batch > 256)) {
          printf("        -");
          continue;
        }
        void* workspace = arrays.filled(workspace_bytes(problem, form), 0);
        printf("%9.1f", replay_time(problem, form, workspace));
      }
      printf("\n");
      fflush(stdout);
    }
  }
}

// The same of long requests for a model of width 256: the form for them beside those of one block
// and of eight a request.
inline void time_long(int only_form, int only_batch) {
  for (const int tokens : {998, 500, 250, 130}) {
    for (const double mean : {0.0, 0.4 * tokens}) {
      Case c;
      c.dim = 256, c.tokens = tokens, c.reach = 128;
      c.mask = mean > 0 ? Case::kPrefix : Case::kFull;
      const Model model(c, 3);
      DeviceArrays device;
      const T5View view = model.view(device);
      printf(
          "%s %d tokens, D 256\nbatch   form 32   form  1   form  8   microseconds of a replay\n",
          mean > 0 ? "lengths even in 1 .. 0.8 of" : "each", tokens);
      for (const int batch : {32, 1, 8, 128}) {
        if (only_batch != 0 && batch != only_batch) continue;
        DeviceArrays arrays;
        const Input in = random_input(c, model.vocab, batch, mean, 5);
        EncodeT5Problem problem{};
        problem.model = view;
        problem.tokens = {arrays.copy_of(in.ids), arrays.copy_of(in.mask), batch, c.tokens};
        problem.states = arrays.filled(in.mask.size() * c.dim * 2, 0xff);
        printf("%5d", batch);
        for (const EncodeForm form :
             {EncodeForm::kLong, EncodeForm::kThroughput, EncodeForm::kCluster8}) {
          if ((only_form != 0 && static_cast<int>(form) != only_form) ||
              (form != EncodeForm::kLong && batch > 8 && tokens > 250)) {
            printf("         -");
            continue;
          }
          void* workspace = arrays.filled(workspace_bytes(problem, form), 0);
          printf("%10.1f", replay_time(problem, form, workspace));
        }
        printf("\n");
        fflush(stdout);
      }
    }
  }
}

}  // namespace sidmlp::native

// The CUDA backend as the rest of the library sees it: no torch, no device code.
//
// An operation is prepared on the host (which array lies where, how many blocks, how much
// workspace), the caller allocates the workspace, and one launch (or two, where a decode is asked
// for that) does everything:
//
//     BeamDecode op;  ... fill op.problem ...;  prepare(op);  launch(op, workspace, stream);
//
// How blocks share requests never changes a sum, so a request's arithmetic never depends on the
// batch. Both functions belong to the current device, never synchronise, and may be called while a
// stream is captured. A problem with batch 0 must not be launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/layout.h"
#include "cuda/problem.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/shape.h"

namespace sidmlp::cuda {

struct LaunchShape {
  int grid;                 // thread blocks
  int64_t workspace_bytes;  // global memory that the launch needs, 16-byte aligned; 0: none
};

struct BeamDecode {
  BeamDecodeProblem problem;
  int launches = 1;  // 2: the first stage of all requests in one of its own, with the same results;
                     // an error unless sm90::two_launches_why_not is nullptr
  bool tensor_cores;                  // csrc/cuda/sm90 decodes, else the plain kernel
  sm90::FirstStageShape first_stage;  // with two launches
  sm90::Shape tensor_core;            // with tensor_cores
  BeamDecodeLayout layout;            // without
  LaunchShape shape;
};

struct ContextReadout {
  ContextReadoutProblem problem;
  bool tensor_cores;               // csrc/cuda/sm90 reads out, else the plain kernel
  sm90::ReadoutShape tensor_core;  // with tensor_cores
  ContextReadoutLayout layout;     // without
  LaunchShape shape;
};

struct LevelLogits {
  LevelLogitsProblem problem;
  LevelLogitsLayout layout;
  LaunchShape shape;
};

// From op.problem and op.launches, the other fields.
cudaError_t prepare(BeamDecode& op);
cudaError_t prepare(ContextReadout& op);
cudaError_t prepare(LevelLogits& op);

cudaError_t launch(const BeamDecode& op, void* workspace, cudaStream_t stream);
cudaError_t launch(const ContextReadout& op, void* workspace, cudaStream_t stream);
cudaError_t launch(const LevelLogits& op, void* workspace, cudaStream_t stream);

}  // namespace sidmlp::cuda

// One launch of the sm90 kernels, from host code.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/shape.h"

namespace sidmlp::cuda::sm90 {

// One launch; `shape` from shape_of, `workspace` of shape.plain_readout.footprint.workspace bytes
// for each team of blocks.
cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, void* workspace,
                   cudaStream_t stream);

// Two launches, of which the second may begin before the first has ended: `first` from
// first_stage_shape, `levels` from shape_of with launches 2, `workspace` of first_stage_bytes.
cudaError_t launch(const BeamDecodeProblem& problem, const FirstStageShape& first,
                   const Shape& levels, void* workspace, cudaStream_t stream);

// One launch; `shape` from readout_shape.
cudaError_t launch(const ContextReadoutProblem& problem, const ReadoutShape& shape,
                   cudaStream_t stream);

}  // namespace sidmlp::cuda::sm90

// One launch of the sm90 kernels, from host code.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/shape.h"

namespace sidmlp::cuda::sm90 {

// One launch; `shape` from shape_of, `workspace` of shape.plain_readout.footprint.workspace bytes
// for each team of blocks.
cudaError_t launch(const BeamDecodeProblem& problem, const Shape& shape, void* workspace,
                   cudaStream_t stream);

// Likewise; `shape` from readout_shape.
cudaError_t launch(const ContextReadoutProblem& problem, const ReadoutShape& shape,
                   cudaStream_t stream);

}  // namespace sidmlp::cuda::sm90

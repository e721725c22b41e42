// Compiled kernels by operator and dtype, each in a file of its own so that they are built side by
// side.
#pragma once

namespace sidmlp::cuda::sm90 {

// For the head width `hidden`, at most 2048 and a multiple of 32, and `resident` blocks on a
// multiprocessor.
const void* beam_decode_bf16(int hidden, int resident);
const void* beam_decode_fp16(int hidden, int resident);
const void* decode_states_bf16(int hidden, int resident);
const void* decode_states_fp16(int hidden, int resident);

// Both operators of many beams or codes (wide_kernel.cuh).
const void* decode_wide_bf16(int hidden);
const void* decode_wide_fp16(int hidden);

// Of a decode in two launches; the levels are beam_decode's kernels.
const void* first_stage_bf16(int hidden, bool states);
const void* first_stage_fp16(int hidden, bool states);

const void* context_readout_bf16();
const void* context_readout_fp16();

}  // namespace sidmlp::cuda::sm90

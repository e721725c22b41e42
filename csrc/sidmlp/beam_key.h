// The order of beam candidates, defined once: higher score first, then the lower parent rank, then
// the lower code. A candidate is one 64-bit key and "better" is "greater": the score's bits made
// monotonic, above the complement of (parent rank, sibling ordinal). Siblings are stored with
// ascending codes, so the ordinal orders as the code does.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SIDMLP_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Never out of line: these are compiled for several instruction sets (csrc/cpu).
#define SIDMLP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sidmlp {

using BeamKey = uint64_t;

constexpr BeamKey kNoKey = 0;             // worse than every candidate's key
constexpr int kMaxBeams = 1 << 16;        // rank and ordinal share 32 bits
constexpr int kMaxCodesPerLevel = 32767;  // codes travel as int16

// Bits of `score` as an unsigned integer that orders like the number; -0 counts as +0.
SIDMLP_HOST_DEVICE uint32_t ordered_bits(float score) {
  const float zero_folded = score + 0.0f;  // -0 + 0 is +0 in round-to-nearest
  uint32_t bits;
  memcpy(&bits, &zero_folded, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

SIDMLP_HOST_DEVICE float score_of_ordered_bits(uint32_t ordered) {
  const uint32_t bits = ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered;
  float score;
  memcpy(&score, &bits, sizeof(score));
  return score;
}

SIDMLP_HOST_DEVICE BeamKey make_beam_key(float score, uint32_t parent_rank, uint32_t ordinal) {
  return (static_cast<BeamKey>(ordered_bits(score)) << 32) |
         static_cast<uint32_t>(~(parent_rank << 16 | ordinal));
}

SIDMLP_HOST_DEVICE float key_score(BeamKey key) {
  return score_of_ordered_bits(static_cast<uint32_t>(key >> 32));
}
SIDMLP_HOST_DEVICE uint32_t key_parent_rank(BeamKey key) {
  return ~static_cast<uint32_t>(key) >> 16;
}
SIDMLP_HOST_DEVICE uint32_t key_ordinal(BeamKey key) {
  return ~static_cast<uint32_t>(key) & 0xffffu;
}

}  // namespace sidmlp

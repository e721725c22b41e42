// The kernel tables that this build holds, one per instruction set.
#pragma once

#include "cpu/kernels.h"

namespace sidmlp::cpu {

namespace plain {
extern const Kernels kKernels;
}
#if defined(SIDMLP_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}
#endif

}  // namespace sidmlp::cpu

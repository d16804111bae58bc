// Instruction sets that kernels are compiled for. Included before Highway, by every file with kernels.
#pragma once

// Each set costs compile time and size: the plain one of the architecture, AVX2 and AVX-512 are what CPUs differ in here.
// Without vectors of a size known to the compiler (SVE) accumulators could not stay in registers.
#define HWY_DISABLED_TARGETS                                                                                               \
    (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_ZEN4 | HWY_AVX3_SPR | HWY_AVX10_2 | HWY_NEON_BF16 | HWY_SVE            \
        | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

#include "hwy/detect_targets.h"

#include <cstdint>

namespace semkv::native
{
// Whether this CPU and its operating system run code of a Highway target (one bit). Highway's own answer is in a library;
// its headers are all that is needed this way.
inline bool runs(int64_t target)
{
#if HWY_ARCH_X86_64
    __builtin_cpu_init();
    bool const avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool const avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd");
    return target == HWY_AVX2 ? avx2 : target == HWY_AVX3 ? avx512 : target == HWY_STATIC_TARGET;
#else
    return target == HWY_STATIC_TARGET;
#endif
}
} // namespace semkv::native

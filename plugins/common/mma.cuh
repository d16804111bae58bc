// Tensor cores: a warp's matrix product, and what surrounds it. Two 16-bit elements of T, a pair, are one register. Device code
// of sm_80 and later only.
#pragma once

#include "device.cuh"

#include <type_traits>

#if defined(SEMKV_EMULATED)
#include "../emulation/mma.h"
#endif

namespace semkv
{
// What this compilation has kernels for; the host asks the kernel that was built.
#if defined(SEMKV_EMULATED)
constexpr bool kTensorCoreBuild = true;
constexpr bool kOtherBuild = true;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kTensorCoreBuild = true;
constexpr bool kOtherBuild = false;
#else
constexpr bool kTensorCoreBuild = false;
constexpr bool kOtherBuild = true;
#endif

// c[16][8] += a[16][16] b[16][8], in the fragments of mma.m16n8k16. All lanes of the warp.
template <typename T>
__device__ __forceinline__ void mma16816(float (&c)[4], unsigned const (&a)[4], unsigned b0, unsigned b1)
{
#if defined(SEMKV_EMULATED)
    emulation::mma16816<T>(c, a, b0, b1);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, __half>)
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    else
    {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#endif
}

// To nearest, ties to even; the first in the lower half.
template <typename T>
__device__ __forceinline__ unsigned packPair(float first, float second)
{
    unsigned pair = 0;
#if defined(SEMKV_EMULATED)
    T const elements[2]{fromFloat<T>(first), fromFloat<T>(second)};
    std::memcpy(&pair, elements, 4);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, __half>)
    {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    }
    else
    {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    }
#endif
    return pair;
}

// a * b + c of each half, rounded once; subnormal numbers are kept.
template <typename T>
__device__ __forceinline__ unsigned fmaPairs(unsigned a, unsigned b, unsigned c)
{
    unsigned pair = 0;
#if defined(SEMKV_EMULATED)
    for (int i = 0; i < 2; ++i)
    {
        float const v = std::fma(emulation::elementOfFragment<T>(&a, i), emulation::elementOfFragment<T>(&b, i),
            emulation::elementOfFragment<T>(&c, i));
        pair |= static_cast<unsigned>(fromFloat<T>(v).bits) << 16 * i;
    }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, __half>)
    {
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    }
    else
    {
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
    }
#endif
    return pair;
}

// 2^x by the special function unit alone, two units in the last place off at most; below 2^-126 it is 0.
__device__ __forceinline__ float fastExp2(float x)
{
#if defined(SEMKV_EMULATED) || !defined(__CUDA_ARCH__)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}
} // namespace semkv

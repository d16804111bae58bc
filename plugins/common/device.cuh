// What every kernel uses: the launch macro, dynamic shared memory, element types, 16-byte vectors.
#pragma once

#include "element.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(SEMKV_EMULATED)
#define SEMKV_SHARED_BYTES(name) unsigned char* const name = ::semkv::emulation::sharedMemory()
#define SEMKV_LAUNCH(grid, block, shared, stream, ...) \
    (static_cast<void>(stream), ::semkv::emulation::launch(grid, block, shared, [&] { SEMKV_CALL(__VA_ARGS__); }))
#define SEMKV_CALL(kernel, ...) SEMKV_UNWRAP kernel(__VA_ARGS__)
#define SEMKV_UNROLL
#define SEMKV_NO_UNROLL
#else
#define SEMKV_SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define SEMKV_LAUNCH(grid, block, shared, stream, ...) SEMKV_CALL(grid, block, shared, stream, __VA_ARGS__)
#define SEMKV_CALL(grid, block, shared, stream, kernel, ...) \
    (SEMKV_UNWRAP kernel<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__))
#define SEMKV_UNROLL _Pragma("unroll")
#define SEMKV_NO_UNROLL _Pragma("unroll 1")
#endif
// The kernel's name is given in parentheses, so that the commas of its template arguments survive the macro.
#define SEMKV_UNWRAP(...) __VA_ARGS__

namespace semkv
{
constexpr unsigned kFullWarp = 0xFFFFFFFFU;
constexpr float kLog2E = 1.4426950408889634F;

__device__ __forceinline__ float minusInfinity()
{
    return __uint_as_float(0xFF800000U);
}

__device__ __forceinline__ float notANumber()
{
    return __uint_as_float(0x7FC00000U);
}

__host__ __device__ constexpr int ceilDivide(int a, int b)
{
    return (a + b - 1) / b;
}

__host__ __device__ constexpr int nextPowerOfTwo(int v)
{
    int p = 1;
    while (p < v)
    {
        p *= 2;
    }
    return p;
}

template <typename T>
__device__ __forceinline__ T fromFloat(float v);
template <>
__device__ __forceinline__ float fromFloat<float>(float v)
{
    return v;
}
template <>
__device__ __forceinline__ __half fromFloat<__half>(float v)
{
    return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 fromFloat<__nv_bfloat16>(float v)
{
    return __float2bfloat16_rn(v);
}

// Calls `launch` with a value of the element's type, whose type is all it should use.
template <typename Launch>
cudaError_t forElement(Element element, Launch const& launch)
{
    switch (element)
    {
    case Element::kFloat32: return launch(float{});
    case Element::kFloat16: return launch(__half{});
    case Element::kBFloat16: return launch(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

// Sixteen bytes of T, the unit of every cache access. Kept as words: a register then holds two 16-bit elements until the
// moment they are used (nvcc gives each element of a 16-bit array a register of its own).
template <typename T>
struct alignas(16) Vector
{
    static constexpr int kSize = 16 / static_cast<int>(sizeof(T));
    unsigned word[4];
};

__device__ __forceinline__ float elementOf(Vector<float> const& v, int i)
{
    return __uint_as_float(v.word[i]);
}
__device__ __forceinline__ float elementOf(Vector<__nv_bfloat16> const& v, int i)
{
    return __uint_as_float(i % 2 == 0 ? v.word[i / 2] << 16 : v.word[i / 2] & 0xFFFF0000U);
}
__device__ __forceinline__ float elementOf(Vector<__half> const& v, int i)
{
    unsigned short const bits = static_cast<unsigned short>(v.word[i / 2] >> i % 2 * 16);
    __half h;
    memcpy(&h, &bits, 2);
    return __half2float(h);
}

template <typename T>
__device__ __forceinline__ Vector<T> packVector(float const (&from)[Vector<T>::kSize])
{
    T elements[Vector<T>::kSize];
    SEMKV_UNROLL
    for (int i = 0; i < Vector<T>::kSize; ++i)
    {
        elements[i] = fromFloat<T>(from[i]);
    }
    Vector<T> v;
    memcpy(&v, elements, 16);
    return v;
}

template <typename T>
__device__ __forceinline__ Vector<T> loadVector(T const* address)
{
    uint4 const raw = *reinterpret_cast<uint4 const*>(address);
    return {{raw.x, raw.y, raw.z, raw.w}};
}

template <typename T>
__device__ __forceinline__ void storeVector(T* address, Vector<T> const& v)
{
    *reinterpret_cast<uint4*>(address) = uint4{v.word[0], v.word[1], v.word[2], v.word[3]};
}

template <typename T>
__device__ __forceinline__ Vector<T> zeroVector()
{
    return {{0U, 0U, 0U, 0U}};
}
} // namespace semkv

// Elements of quantised caches: how 16 bytes of them become floats, how a float becomes one, and access to the call's own
// element type where a kernel is made once for all of them.
#pragma once

#include "../common/device.cuh"
#include "../common/element.h"

namespace semkv
{
struct Int8
{
    signed char bits;
};
struct Fp8 // e4m3fn: no infinity, largest 448
{
    unsigned char bits;
};

template <typename T>
constexpr bool kIsCode = false;
template <>
constexpr bool kIsCode<Int8> = true;
template <>
constexpr bool kIsCode<Fp8> = true;

// What the largest magnitude of a row is stored as.
template <typename T>
constexpr float kCodeLimit = 127.0F;
template <>
constexpr float kCodeLimit<Fp8> = 448.0F;

// What `elementOf` leaves to be multiplied; it goes into the slot's scale.
template <typename T>
constexpr float kCodeFactor = 1.0F;
template <>
constexpr float kCodeFactor<Fp8> = 256.0F;

// The code, made positive, as the low bits of 2^23: one byte permutation and one exact subtraction. An integer conversion
// has a quarter of that throughput or less.
__device__ __forceinline__ float elementOf(Vector<Int8> const& v, int i)
{
    unsigned const positive = v.word[i / 4] ^ 0x80808080U;
    return __uint_as_float(__byte_perm(positive, 0x4B000000U, 0x7440U | static_cast<unsigned>(i % 4))) - 8388736.0F;
}

// Two codes at a time as float16 of the same bits, whose exponent counts from 15 instead of 7: 256 times too small,
// subnormals included.
__device__ __forceinline__ float elementOf(Vector<Fp8> const& v, int i)
{
    unsigned const spread = __byte_perm(v.word[i / 4], 0U, i % 4 < 2 ? 0x1404U : 0x3424U);
    unsigned const halves = (spread & 0x80008000U) | ((spread & 0x7F007F00U) >> 1);
    unsigned short const bits = static_cast<unsigned short>(halves >> i % 2 * 16);
    __half h;
    memcpy(&h, &bits, 2);
    return __half2float(h);
}

// To nearest, ties to even; beyond the limit, the limit.
template <typename T>
__device__ __forceinline__ T encode(float v);
template <>
__device__ __forceinline__ Int8 encode<Int8>(float v)
{
    return {static_cast<signed char>(fminf(fmaxf(rintf(v), -127.0F), 127.0F))};
}
template <>
__device__ __forceinline__ Fp8 encode<Fp8>(float v)
{
    unsigned const sign = __float_as_uint(v) >> 24 & 0x80U;
    float const size = fminf(fabsf(v), 448.0F);
    unsigned code;
    if (size < 0.015625F) // below 2^-6: a multiple of 2^-9; eight of them are the smallest normal number
    {
        code = static_cast<unsigned>(rintf(size * 512.0F));
    }
    else
    {
        unsigned const bits = __float_as_uint(size);
        code = ((bits + 0x7FFFFU + (bits >> 20 & 1U)) >> 20) - (120U << 3);
    }
    return {static_cast<unsigned char>(sign | code)};
}

__device__ __forceinline__ float loadElement(void const* base, Element element, int64_t index)
{
    switch (element)
    {
    case Element::kFloat16: return __half2float(static_cast<__half const*>(base)[index]);
    case Element::kBFloat16: return __bfloat162float(static_cast<__nv_bfloat16 const*>(base)[index]);
    default: return static_cast<float const*>(base)[index];
    }
}

__device__ __forceinline__ void storeElement(void* base, Element element, int64_t index, float v)
{
    switch (element)
    {
    case Element::kFloat16: static_cast<__half*>(base)[index] = fromFloat<__half>(v); break;
    case Element::kBFloat16: static_cast<__nv_bfloat16*>(base)[index] = fromFloat<__nv_bfloat16>(v); break;
    default: static_cast<float*>(base)[index] = v;
    }
}
} // namespace semkv

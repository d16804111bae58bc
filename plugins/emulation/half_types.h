// Storage and conversions of __half and __nv_bfloat16, round to nearest even, subnormals kept, as the hardware does.
#pragma once

#include "emulation.h"

struct __half
{
    uint16_t bits;
};
struct __nv_bfloat16
{
    uint16_t bits;
};

inline float __half2float(__half h)
{
    uint32_t const sign = static_cast<uint32_t>(h.bits & 0x8000U) << 16;
    uint32_t const exponent = (h.bits >> 10) & 0x1FU;
    uint32_t const mantissa = h.bits & 0x3FFU;
    if (exponent == 0)
    {
        float const magnitude = std::ldexp(static_cast<float>(mantissa), -24);
        return sign != 0 ? -magnitude : magnitude;
    }
    uint32_t const bits
        = exponent == 31 ? sign | 0x7F800000U | (mantissa << 13) : sign | ((exponent + 112U) << 23) | (mantissa << 13);
    return __uint_as_float(bits);
}

inline __half __float2half_rn(float value)
{
    uint32_t const bits = __float_as_uint(value);
    uint16_t const sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
    uint32_t const magnitude = bits & 0x7FFFFFFFU;
    if (magnitude > 0x7F800000U)
    {
        return {static_cast<uint16_t>(sign | 0x7E00U)};
    }
    if (magnitude >= 0x477FF000U) // 65520 and above round to infinity
    {
        return {static_cast<uint16_t>(sign | 0x7C00U)};
    }
    if (magnitude < 0x38800000U) // below 2^-14: a multiple of 2^-24
    {
        float const scaled = std::ldexp(__uint_as_float(magnitude), 24);
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(scaled)))};
    }
    uint32_t const odd = (magnitude >> 13) & 1U;
    uint32_t const rounded = magnitude + 0xFFFU + odd - (112U << 23);
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

inline float __bfloat162float(__nv_bfloat16 b)
{
    return __uint_as_float(static_cast<uint32_t>(b.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value)
{
    uint32_t const bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U)
    {
        return {0x7FFFU};
    }
    return {static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
}

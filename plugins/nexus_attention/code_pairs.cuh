// Pieces of a cached row as pairs of 16-bit elements, the operands of tensor cores: rows of 16-bit elements as they are, codes
// of quantised rows converted exactly, up to kCodeFactor.
#pragma once

#include "../common/mma.cuh"
#include "codes.cuh"

namespace semkv
{
// The elements of a cached row that one lane loads at once.
template <int kWords>
struct Piece
{
    unsigned word[kWords];
};

template <int kWords>
__device__ __forceinline__ Piece<kWords> loadPiece(void const* address)
{
    static_assert(kWords == 2 || kWords == 4);
    if constexpr (kWords == 4)
    {
        uint4 const raw = *static_cast<uint4 const*>(address);
        return {{raw.x, raw.y, raw.z, raw.w}};
    }
    else
    {
        uint2 const raw = *static_cast<uint2 const*>(address);
        return {{raw.x, raw.y}};
    }
}

// Codes 2 * upper and 2 * upper + 1 of a word.
template <typename T, typename C>
__device__ __forceinline__ unsigned pairOfCodes(unsigned word, bool upper)
{
    if constexpr (std::is_same_v<C, Int8> && std::is_same_v<T, __half>)
    {
        // Made positive, as the low bits of 1024; 1152 less is the code.
        unsigned const positive = word ^ 0x80808080U;
        return fmaPairs<T>(__byte_perm(positive, 0x64646464U, upper ? 0x4342U : 0x4140U), 0x3C003C00U, 0xE480E480U);
    }
    else if constexpr (std::is_same_v<C, Int8>)
    {
        // Seven bits as the low bits of 128; 128 less, or with the sign bit 256 less, is the code.
        unsigned const spread = __byte_perm(word, 0U, upper ? 0x4342U : 0x4140U);
        return fmaPairs<T>(
            (spread & 0x007F007FU) | 0x43004300U, 0x3F803F80U, (spread & 0x00800080U) | 0xC300C300U);
    }
    else
    {
        // The bits of e4m3 in the place of a wider type's: its exponent counts from another number.
        unsigned const spread = __byte_perm(word, 0U, upper ? 0x3424U : 0x1404U);
        if constexpr (std::is_same_v<T, __half>)
        {
            return (spread & 0x80008000U) | (spread >> 1 & 0x3F803F80U);
        }
        else
        {
            unsigned const bits = (spread & 0x80008000U) | (spread >> 4 & 0x07F007F0U);
            return fmaPairs<T>(bits, 0x77807780U, 0x80008000U); // 2^112 times that, less 0
        }
    }
}

// Elements 2 * pair and 2 * pair + 1 of a piece.
template <typename T, typename C, int kWords>
__device__ __forceinline__ unsigned pairOf(Piece<kWords> const& piece, int pair)
{
    if constexpr (kIsCode<C>)
    {
        return pairOfCodes<T, C>(piece.word[pair / 2], pair % 2 != 0);
    }
    else
    {
        return piece.word[pair];
    }
}

// Element i of one piece and of another.
template <typename T, typename C, int kWords>
__device__ __forceinline__ unsigned pairAcross(Piece<kWords> const& first, Piece<kWords> const& second, int i)
{
    if constexpr (kIsCode<C>)
    {
        unsigned const four = __byte_perm(first.word[i / 4], second.word[i / 4], i % 4 < 2 ? 0x5140U : 0x7362U);
        return pairOfCodes<T, C>(four, i % 2 != 0);
    }
    else
    {
        return __byte_perm(first.word[i / 2], second.word[i / 2], i % 2 == 0 ? 0x5410U : 0x7632U);
    }
}
} // namespace semkv

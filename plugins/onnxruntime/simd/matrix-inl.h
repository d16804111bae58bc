// Products of float32 matrices. Compiled once for each instruction set.
#if defined(SEMKV_MATRIX_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_MATRIX_INL_H
#undef SEMKV_MATRIX_INL_H
#else
#define SEMKV_MATRIX_INL_H
#endif

#include "elements-inl.h"

#include <algorithm>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Rows and vectors of a product whose sums are in registers at once.
constexpr int kProductRows = HWY_MAX_BYTES == 64 ? 6 : 4;
constexpr int kProductVectors = HWY_MAX_BYTES == 64 ? 4 : 2;

// The left factor [m,k]: element (i,j) lies at data[i * row + j * column], so that it may be another matrix turned.
struct LeftFactor
{
    float const* data;
    int64_t row;
    int64_t column;
};

template <int Rows, int Vectors>
HWY_INLINE void productBlock(
    LeftFactor const& left, int64_t inner, float const* right, int64_t rightRow, float* to, int64_t toRow)
{
    FloatVec sum[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
    {
        for (int v = 0; v < Vectors; ++v)
        {
            sum[r][v] = hn::Zero(Floats());
        }
    }
    for (int64_t k = 0; k < inner; ++k)
    {
        FloatVec of[Vectors];
        for (int v = 0; v < Vectors; ++v)
        {
            of[v] = hn::LoadU(Floats(), right + k * rightRow + v * static_cast<int64_t>(kLanes));
        }
        for (int r = 0; r < Rows; ++r)
        {
            auto const factor = hn::Set(Floats(), left.data[r * left.row + k * left.column]);
            for (int v = 0; v < Vectors; ++v)
            {
                sum[r][v] = hn::MulAdd(factor, of[v], sum[r][v]);
            }
        }
    }
    for (int r = 0; r < Rows; ++r)
    {
        for (int v = 0; v < Vectors; ++v)
        {
            hn::StoreU(sum[r][v], Floats(), to + r * toRow + v * static_cast<int64_t>(kLanes));
        }
    }
}

template <int Vectors>
HWY_INLINE void productColumns(LeftFactor left, int64_t rows, int64_t inner, float const* right, int64_t rightRow, float* to,
    int64_t toRow)
{
    int64_t at = 0;
    for (; at + kProductRows <= rows; at += kProductRows)
    {
        productBlock<kProductRows, Vectors>(left, inner, right, rightRow, to + at * toRow, toRow);
        left.data += kProductRows * left.row;
    }
    for (; at < rows; ++at)
    {
        productBlock<1, Vectors>(left, inner, right, rightRow, to + at * toRow, toRow);
        left.data += left.row;
    }
}

// to [rows,columns] = left [rows,inner] . right [inner,columns]; `columns` are whole vectors.
HWY_INLINE void product(LeftFactor const& left, int64_t rows, int64_t inner, float const* right, int64_t rightRow,
    int64_t columns, float* to, int64_t toRow)
{
    constexpr auto kWide = kProductVectors * static_cast<int64_t>(kLanes);
    int64_t at = 0;
    for (; at + kWide <= columns; at += kWide)
    {
        productColumns<kProductVectors>(left, rows, inner, right + at, rightRow, to + at, toRow);
    }
    for (; at < columns; at += static_cast<int64_t>(kLanes))
    {
        productColumns<1>(left, rows, inner, right + at, rightRow, to + at, toRow);
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

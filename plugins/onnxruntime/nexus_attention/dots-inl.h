// Dot products of query rows with keys, and weighted sums of values, of a block of positions. Compiled once for each
// instruction set.
#if defined(SEMKV_DOTS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_DOTS_INL_H
#undef SEMKV_DOTS_INL_H
#else
#define SEMKV_DOTS_INL_H
#endif

#include "block-inl.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Query rows that share a load of keys or values.
constexpr int kRowTile = 4;
// Keys in flight, and vectors of a value row at once: what registers hold.
constexpr int kKeysAtOnce = HWY_MAX_BYTES == 64 ? 4 : 2;
constexpr int kVectorsAtOnce = HWY_MAX_BYTES == 32 ? 2 : 4;

constexpr int64_t padded(int64_t size)
{
    return (size + static_cast<int64_t>(kLanes) - 1) / static_cast<int64_t>(kLanes) * static_cast<int64_t>(kLanes);
}

// Sums of `Count` vectors that lie one after the other, in the lanes of one.
template <size_t Count>
HWY_INLINE FloatVec sums(float const* vectors)
{
    if constexpr (Count == 1)
    {
        return hn::Load(Floats(), vectors);
    }
    else
    {
        auto const low = sums<Count / 2>(vectors);
        auto const high = sums<Count / 2>(vectors + Count / 2 * kLanes);
        return hn::Add(hn::ConcatEven(Floats(), high, low), hn::ConcatOdd(Floats(), high, low));
    }
}

// How much of a row of `size` elements there is from element i on: more than a vector where rows are of whole vectors, so
// that no load needs to look.
template <bool Whole>
HWY_INLINE size_t left(int64_t size, int64_t i)
{
    return Whole ? kLanes : static_cast<size_t>(size - i);
}

// Asks for a row that will be read soon: pages end where the hardware's own guesses do, and gathers have no order.
template <class T>
HWY_INLINE void ask(T const* row, int64_t size)
{
    auto const* bytes = reinterpret_cast<char const*>(row);
    for (size_t i = 0; i < static_cast<size_t>(size) * sizeof(T); i += 64)
    {
        hwy::Prefetch(bytes + i);
    }
}

// products[r,n] = queries[r] . keys[row[n]] for `Rows` rows and a block of positions. Rows of `next` are asked for.
template <int Rows, bool Whole, class T>
HWY_INLINE void products(
    T const* keys, size_t const* row, size_t const* next, int64_t count, float const* queries, int64_t size, float* to)
{
    HWY_ALIGN float partial[kRowTile * kLanes * kLanes];
    int64_t const stride = padded(size);
    for (int64_t n0 = 0; n0 < count; n0 += kLanes)
    {
        for (size_t u = 0; u < kLanes; u += kKeysAtOnce)
        {
            FloatVec sum[Rows][kKeysAtOnce];
            T const* key[kKeysAtOnce];
            for (int k = 0; k < kKeysAtOnce; ++k)
            {
                key[k] = keys + row[n0 + u + k];
                ask(keys + next[n0 + u + k], size);
                for (int r = 0; r < Rows; ++r)
                {
                    sum[r][k] = hn::Zero(Floats());
                }
            }
            for (int64_t i = 0; i < size; i += kLanes)
            {
                FloatVec query[Rows];
                for (int r = 0; r < Rows; ++r)
                {
                    query[r] = hn::LoadU(Floats(), queries + r * stride + i);
                }
                for (int k = 0; k < kKeysAtOnce; ++k)
                {
                    auto const part = load(key[k] + i, left<Whole>(size, i));
                    for (int r = 0; r < Rows; ++r)
                    {
                        sum[r][k] = hn::MulAdd(part, query[r], sum[r][k]);
                    }
                }
            }
            for (int r = 0; r < Rows; ++r)
            {
                for (int k = 0; k < kKeysAtOnce; ++k)
                {
                    hn::Store(sum[r][k], Floats(), partial + (r * kLanes + u + k) * kLanes);
                }
            }
        }
        for (int r = 0; r < Rows; ++r)
        {
            hn::StoreU(sums<kLanes>(partial + r * kLanes * kLanes), Floats(), to + r * kBlock + n0);
        }
    }
}

// sums[r] = sums[r] * factor[r] + sum over n of weights[r,n] * values[row[n]], `Vectors` vectors of each row. Rows of
// `next` are asked for.
template <int Rows, int Vectors, bool Whole, class T>
HWY_INLINE void weighted(T const* values, size_t const* row, size_t const* next, int64_t count, float const* weights,
    float const* factor, int64_t size, float* sums)
{
    int64_t const stride = padded(size);
    for (int64_t i = 0; i < size; i += Vectors * kLanes)
    {
        FloatVec sum[Rows][Vectors];
        for (int r = 0; r < Rows; ++r)
        {
            for (int v = 0; v < Vectors; ++v)
            {
                sum[r][v] = hn::Mul(hn::LoadU(Floats(), sums + r * stride + i + v * kLanes), hn::Set(Floats(), factor[r]));
            }
        }
        for (int64_t n = 0; n < count; ++n)
        {
            if (i == 0)
            {
                ask(values + next[n], size);
            }
            FloatVec value[Vectors];
            for (int v = 0; v < Vectors; ++v)
            {
                int64_t const at = i + v * static_cast<int64_t>(kLanes);
                value[v] = load(values + row[n] + at, left<Whole>(size, at));
            }
            for (int r = 0; r < Rows; ++r)
            {
                auto const weight = hn::Set(Floats(), weights[r * kBlock + n]);
                for (int v = 0; v < Vectors; ++v)
                {
                    sum[r][v] = hn::MulAdd(weight, value[v], sum[r][v]);
                }
            }
        }
        for (int r = 0; r < Rows; ++r)
        {
            for (int v = 0; v < Vectors; ++v)
            {
                hn::StoreU(sum[r][v], Floats(), sums + r * stride + i + v * kLanes);
            }
        }
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

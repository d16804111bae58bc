// Attention of few rows: dot products along the head, as fast as keys and values come from memory. Compiled once for each
// instruction set.
#if defined(SEMKV_ROWS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_ROWS_INL_H
#undef SEMKV_ROWS_INL_H
#else
#define SEMKV_ROWS_INL_H
#endif

#include "dots-inl.h"

#include <type_traits>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Calls `code` with the number of rows, 1 to kRowTile, as a type.
template <class Code>
HWY_INLINE void withRows(int64_t rows, Code const& code)
{
    switch (rows)
    {
    case 1: return code(std::integral_constant<int, 1>());
    case 2: return code(std::integral_constant<int, 2>());
    case 3: return code(std::integral_constant<int, 3>());
    default: return code(std::integral_constant<int, 4>());
    }
}

// The block's logits for query row r, whose products lie in `row`; -inf for what it does not see.
inline void finishLogits(HeadView const& head, Block const& block, int64_t r, float* row)
{
    Visible const seen = visible(head, r);
    bool const all = block.allSeenBy(seen);
    auto const first = hn::Set(Ints(), static_cast<int32_t>(seen.first));
    auto const last = hn::Set(Ints(), static_cast<int32_t>(seen.end - 1));
    for (int64_t n = 0; n < block.count; n += kLanes)
    {
        auto product = hn::LoadU(Floats(), row + n);
        if (head.keyScale != nullptr)
        {
            product = hn::Mul(product, hn::Load(Floats(), block.keyScale + n));
        }
        auto logit = logits(product, hn::Load(Floats(), block.bias + n), head.call->softcap);
        if (!all)
        {
            auto const slot = hn::Load(Ints(), block.slot + n);
            auto const in = hn::RebindMask(Floats(), hn::And(hn::Ge(slot, first), hn::Le(slot, last)));
            logit = hn::IfThenElse(in, logit, hn::Set(Floats(), kNever));
        }
        hn::StoreU(logit, Floats(), row + n);
    }
}

template <class T>
void blockLogits(HeadView const& head, Block const& block, Block const& next, float const* queries, int64_t first,
    int64_t rows, float* to)
{
    auto const* keys = static_cast<T const*>(head.keys);
    int64_t const size = head.call->headSize;
    float const* query = queries + first * padded(size);
    withRows(rows, [&](auto known) {
        constexpr int kRows = decltype(known)::value;
        if (size == padded(size))
        {
            products<kRows, true>(keys, block.row, next.row, block.count, query, size, to);
        }
        else
        {
            products<kRows, false>(keys, block.row, next.row, block.count, query, size, to);
        }
    });
    for (int64_t r = 0; r < rows; ++r)
    {
        finishLogits(head, block, first + r, to + r * kBlock);
    }
}

// Logits become weights relative to the largest one so far; returns what earlier sums are to be multiplied with.
inline float updateState(float* row, int64_t count, RowState& state)
{
    auto largest = hn::Set(Floats(), state.largest);
    for (int64_t n = 0; n < count; n += kLanes)
    {
        largest = hn::Max(largest, hn::LoadU(Floats(), row + n));
    }
    // Where nothing has been seen yet all weights are 0, as exp(-inf - x) is for any x.
    float const after = std::max(hn::ReduceMax(Floats(), largest), std::numeric_limits<float>::lowest());
    auto const relative = hn::Set(Floats(), after);
    auto sum = hn::Zero(Floats());
    for (int64_t n = 0; n < count; n += kLanes)
    {
        auto const weight = exponential(hn::Sub(hn::LoadU(Floats(), row + n), relative));
        sum = hn::Add(sum, weight);
        hn::StoreU(weight, Floats(), row + n);
    }
    float const factor = hn::GetLane(exponential(hn::Set(Floats(), state.largest - after)));
    state = {after, state.sum * factor + hn::ReduceSum(Floats(), sum)};
    return factor;
}

// sums = sums * factor + weights . values, for as many rows as there are.
template <class T>
void addWeighted(HeadView const& head, Block const& block, Block const& next, int64_t rows, float const* weights,
    float const* factor, float* sums)
{
    auto const* values = static_cast<T const*>(head.values);
    int64_t const size = head.call->headSize;
    withRows(rows, [&](auto known) {
        constexpr int kRows = decltype(known)::value;
        if (size % (kVectorsAtOnce * static_cast<int64_t>(kLanes)) == 0)
        {
            weighted<kRows, kVectorsAtOnce, true>(values, block.row, next.row, block.count, weights, factor, size, sums);
        }
        else if (size == padded(size))
        {
            weighted<kRows, 1, true>(values, block.row, next.row, block.count, weights, factor, size, sums);
        }
        else
        {
            weighted<kRows, 1, false>(values, block.row, next.row, block.count, weights, factor, size, sums);
        }
    });
}

template <class T>
void attendPieceOf(HeadView const& head, float const* queries, int64_t from, int64_t end, float* sums, RowState* states)
{
    int64_t const stride = padded(head.call->headSize), rows = head.queryRows();
    std::fill(sums, sums + rows * stride, 0.0f);
    std::fill(states, states + rows, RowState{kNever, 0.0f});
    Block blocks[2];
    HWY_ALIGN float weights[kRowTile * kBlock];
    float factor[kRowTile];
    blocks[0].fill(head, from, end);
    for (int64_t at = from; at < end; at += kBlock)
    {
        Block const& block = blocks[(at - from) / kBlock % 2];
        Block& other = blocks[(at - from) / kBlock % 2 ^ 1];
        if (at + kBlock < end)
        {
            other.fill(head, at + kBlock, end);
        }
        Block const& next = at + kBlock < end ? other : block;
        for (int64_t first = 0; first < rows; first += kRowTile)
        {
            int64_t const count = std::min<int64_t>(kRowTile, rows - first);
            // What has been asked for once is not asked for again.
            Block const& ahead = first == 0 ? next : block;
            blockLogits<T>(head, block, ahead, queries, first, count, weights);
            for (int64_t r = 0; r < count; ++r)
            {
                float* row = weights + r * kBlock;
                factor[r] = updateState(row, block.count, states[first + r]);
                for (int64_t n = 0; head.valueScale != nullptr && n < block.count; n += kLanes)
                {
                    auto const scale = hn::Load(Floats(), block.valueScale + n);
                    hn::StoreU(hn::Mul(hn::LoadU(Floats(), row + n), scale), Floats(), row + n);
                }
            }
            addWeighted<T>(head, block, ahead, count, weights, factor, sums + first * stride);
        }
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

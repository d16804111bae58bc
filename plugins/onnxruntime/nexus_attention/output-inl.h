// Query rows in, new cache rows and output rows out, with the conversions of their types. Compiled once for each
// instruction set.
#if defined(SEMKV_OUTPUT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_OUTPUT_INL_H
#undef SEMKV_OUTPUT_INL_H
#else
#define SEMKV_OUTPUT_INL_H
#endif

#include "../simd/convert-inl.h"
#include "rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Where row r of a head lies in `query` and `output` [B,Hq,S,D], in elements.
inline int64_t elementOf(HeadView const& head, int64_t r)
{
    NexusAttentionCall const& call = *head.call;
    int64_t const group = head.group();
    int64_t const queryHead = head.kvHead * group + r % group;
    return ((head.batchRow * call.heads + queryHead) * call.rows + r / group) * call.headSize;
}

inline void loadQuery(HeadView const& head, int64_t r, float* to)
{
    int64_t const size = head.call->headSize;
    auto const scale = hn::Set(Floats(), head.call->scale);
    withType(head.call->element, head.call->query, [&](auto const* data) {
        for (int64_t i = 0; i < size; i += kLanes)
        {
            auto const value = load(data + elementOf(head, r) + i, static_cast<size_t>(size - i));
            hn::StoreU(hn::Mul(value, scale), Floats(), to + i);
        }
    });
}

inline void loadQueries(HeadView const& head, float* to)
{
    for (int64_t r = 0; r < head.queryRows(); ++r)
    {
        loadQuery(head, r, to + r * padded(head.call->headSize));
    }
}

inline void storeOutput(HeadView const& head, int64_t r, float const* row, float factor)
{
    int64_t const size = head.call->headSize;
    auto const times = hn::Set(Floats(), factor);
    withType(head.call->element, head.call->output, [&](auto const* data) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(data)>>;
        if constexpr (!std::is_same_v<T, int8_t>)
        {
            T* to = const_cast<T*>(data) + elementOf(head, r);
            for (int64_t i = 0; i < size; i += kLanes)
            {
                store(hn::Mul(load(row + i, static_cast<size_t>(size - i)), times), to + i, static_cast<size_t>(size - i));
            }
        }
    });
}

inline RowState merge(HeadView const& head, int64_t r, int64_t pieces, float const* sums, int64_t sumStride,
    RowState const* states, int64_t stateStride)
{
    int64_t const size = head.call->headSize;
    RowState merged{kNever, 0.0f};
    for (int64_t p = 0; p < pieces; ++p)
    {
        merged.largest = std::max(merged.largest, states[p * stateStride].largest);
    }
    HWY_ALIGN float row[kLongestHead] = {};
    for (int64_t p = 0; p < pieces; ++p)
    {
        RowState const& state = states[p * stateStride];
        auto const factor = exponential(hn::Set(Floats(), state.largest - merged.largest));
        merged.sum += hn::GetLane(factor) * state.sum;
        for (int64_t i = 0; i < size; i += kLanes)
        {
            auto const sum = hn::LoadU(Floats(), sums + p * sumStride + i);
            hn::Store(hn::MulAdd(sum, factor, hn::Load(Floats(), row + i)), Floats(), row + i);
        }
    }
    storeOutput(head, r, row, 1.0f / merged.sum);
    return merged;
}

inline void append(void const* rows, Element element, int64_t count, int64_t size, void* cache, Element cacheElement,
    float* scales)
{
    withType(element, rows, [&](auto const* from) {
        withType(cacheElement, cache, [&](auto const* untyped) {
            using T = std::remove_cv_t<std::remove_pointer_t<decltype(untyped)>>;
            T* to = const_cast<T*>(untyped);
            for (int64_t n = 0; n < count; ++n)
            {
                if constexpr (std::is_same_v<T, int8_t>)
                {
                    scales[n] = quantize(from + n * size, size, to + n * size);
                }
                else
                {
                    for (int64_t i = 0; i < size; i += kLanes)
                    {
                        auto const left = static_cast<size_t>(size - i);
                        store(load(from + n * size + i, left), to + n * size + i, left);
                    }
                }
            }
        });
    });
}

// The softmax weights at the positions from..end-1, summed over all query rows and added to what their slots got.
template <class T>
void addMassOf(HeadView const& head, float const* queries, RowState const* states, int64_t from, int64_t end, float* mass)
{
    Block block;
    HWY_ALIGN float row[kRowTile * kBlock];
    for (int64_t at = from; at < end; at += kBlock)
    {
        block.fill(head, at, end);
        for (int64_t first = 0; first < head.queryRows(); first += kRowTile)
        {
            int64_t const rows = std::min<int64_t>(kRowTile, head.queryRows() - first);
            blockLogits<T>(head, block, block, queries, first, rows, row);
            for (int64_t r = 0; r < rows; ++r)
            {
                RowState const& state = states[first + r];
                auto const largest = hn::Set(Floats(), state.largest);
                auto const part = hn::Set(Floats(), 1.0f / state.sum);
                for (int64_t n = 0; n < block.count; n += kLanes)
                {
                    float* to = row + r * kBlock + n;
                    auto const weight = exponential(hn::Sub(hn::LoadU(Floats(), to), largest));
                    hn::StoreU(hn::Mul(weight, part), Floats(), to);
                }
                // A slot may be named twice, so that there is no vector of sums.
                for (int64_t n = 0; n < block.count; ++n)
                {
                    mass[block.slot[n]] += row[r * kBlock + n];
                }
            }
        }
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

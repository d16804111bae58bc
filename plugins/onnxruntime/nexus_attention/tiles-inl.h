// Attention of many rows: matrix products of blocks of positions with panels of query rows. Everything that belongs to a
// query row lies in a column, so that keys and values are multiplied as they lie in the cache and softmax goes down columns.
// Compiled once for each instruction set.
#if defined(SEMKV_TILES_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_TILES_INL_H
#undef SEMKV_TILES_INL_H
#else
#define SEMKV_TILES_INL_H
#endif

#include "output-inl.h"

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// A panel's columns: vectors of accumulators, four rows of which fill the registers.
constexpr int64_t kPanelVectors = HWY_MAX_BYTES == 32 ? 2 : 4;
constexpr int64_t kPanel = kPanelVectors * static_cast<int64_t>(kLanes);
constexpr int kTileRows = 4;

// to[m,:] += sum over k of a[m * aRow + k * aColumn] * b[k,:] for `Rows` rows of a panel.
template <int Rows>
HWY_INLINE void addProduct(
    float const* a, int64_t aRow, int64_t aColumn, float const* b, int64_t depth, float* to, bool fromZero)
{
    FloatVec sum[Rows][kPanelVectors];
    for (int m = 0; m < Rows; ++m)
    {
        for (int64_t v = 0; v < kPanelVectors; ++v)
        {
            sum[m][v] = fromZero ? hn::Zero(Floats()) : hn::Load(Floats(), to + m * kPanel + v * kLanes);
        }
    }
    for (int64_t k = 0; k < depth; ++k)
    {
        FloatVec row[kPanelVectors];
        for (int64_t v = 0; v < kPanelVectors; ++v)
        {
            row[v] = hn::Load(Floats(), b + k * kPanel + v * kLanes);
        }
        for (int m = 0; m < Rows; ++m)
        {
            auto const factor = hn::Set(Floats(), a[m * aRow + k * aColumn]);
            for (int64_t v = 0; v < kPanelVectors; ++v)
            {
                sum[m][v] = hn::MulAdd(factor, row[v], sum[m][v]);
            }
        }
    }
    for (int m = 0; m < Rows; ++m)
    {
        for (int64_t v = 0; v < kPanelVectors; ++v)
        {
            hn::Store(sum[m][v], Floats(), to + m * kPanel + v * kLanes);
        }
    }
}

inline void addProducts(float const* a, int64_t aRow, int64_t aColumn, int64_t rows, float const* b, int64_t depth,
    float* to, bool fromZero)
{
    int64_t m = 0;
    for (; m + kTileRows <= rows; m += kTileRows)
    {
        addProduct<kTileRows>(a + m * aRow, aRow, aColumn, b, depth, to + m * kPanel, fromZero);
    }
    for (; m < rows; ++m)
    {
        addProduct<1>(a + m * aRow, aRow, aColumn, b, depth, to + m * kPanel, fromZero);
    }
}

// A panel of query rows first..end-1 and what becomes of them.
struct Panel
{
    float* queries; // [D,kPanel]
    float* sums;    // [D,kPanel]
    float* largest; // [kPanel]
    float* sum;     // [kPanel]
    int32_t* from;  // [kPanel] first and
    int32_t* last;  // [kPanel] last slot that a row sees
    int64_t first;
    int64_t end;
};

// The block's products [kBlock,kPanel] become weights, and the panel's sums are brought to the new largest logits.
inline void softmaxColumns(HeadView const& head, Block const& block, Panel const& panel, bool all, float* products)
{
    auto const size = head.call->headSize;
    for (int64_t v = 0; v < kPanel; v += kLanes)
    {
        auto const first = hn::Load(Ints(), panel.from + v), last = hn::Load(Ints(), panel.last + v);
        auto const before = hn::Load(Floats(), panel.largest + v);
        auto largest = before;
        for (int64_t n = 0; n < block.count; ++n)
        {
            float* at = products + n * kPanel + v;
            auto logit = logits(hn::Load(Floats(), at), hn::Set(Floats(), block.bias[n]), head.call->softcap);
            if (!all)
            {
                auto const slot = hn::Set(Ints(), block.slot[n]);
                auto const in = hn::RebindMask(Floats(), hn::And(hn::Ge(slot, first), hn::Le(slot, last)));
                logit = hn::IfThenElse(in, logit, hn::Set(Floats(), kNever));
            }
            largest = hn::Max(largest, logit);
            hn::Store(logit, Floats(), at);
        }
        largest = hn::Max(largest, hn::Set(Floats(), std::numeric_limits<float>::lowest()));
        auto sum = hn::Zero(Floats());
        for (int64_t n = 0; n < block.count; ++n)
        {
            float* at = products + n * kPanel + v;
            auto const weight = exponential(hn::Sub(hn::Load(Floats(), at), largest));
            sum = hn::Add(sum, weight);
            hn::Store(weight, Floats(), at);
        }
        auto const factor = exponential(hn::Sub(before, largest));
        hn::Store(largest, Floats(), panel.largest + v);
        hn::Store(hn::MulAdd(hn::Load(Floats(), panel.sum + v), factor, sum), Floats(), panel.sum + v);
        if (!hn::AllTrue(Floats(), hn::Eq(factor, hn::Set(Floats(), 1.0f))))
        {
            for (int64_t d = 0; d < size; ++d)
            {
                float* at = panel.sums + d * kPanel + v;
                hn::Store(hn::Mul(hn::Load(Floats(), at), factor), Floats(), at);
            }
        }
    }
}

// The block's rows of keys or values as float32 [count,D], times their scales: where they lie, or copied.
template <class T>
HWY_INLINE float const* blockRows(
    T const* rows, Block const& block, bool contiguous, float const* scale, int64_t size, float* copy)
{
    if constexpr (sizeof(T) == sizeof(float))
    {
        if (contiguous)
        {
            return rows + block.row[0];
        }
    }
    for (int64_t n = 0; n < block.count; ++n)
    {
        auto const factor = hn::Set(Floats(), scale == nullptr ? 1.0f : scale[n]);
        for (int64_t i = 0; i < size; i += kLanes)
        {
            auto const count = static_cast<size_t>(size - i);
            store(hn::Mul(load(rows + block.row[n] + i, count), factor), copy + n * size + i, count);
        }
    }
    return copy;
}

inline void openPanel(HeadView const& head, Panel const& panel)
{
    int64_t const size = head.call->headSize;
    std::fill(panel.queries, panel.queries + size * kPanel, 0.0f);
    std::fill(panel.sums, panel.sums + size * kPanel, 0.0f);
    for (int64_t c = 0; c < kPanel; ++c)
    {
        int64_t const r = std::min(panel.first + c, panel.end - 1);
        Visible const seen = visible(head, r);
        panel.from[c] = static_cast<int32_t>(seen.first);
        panel.last[c] = static_cast<int32_t>(seen.end - 1);
        panel.largest[c] = kNever;
        panel.sum[c] = 0.0f;
        HWY_ALIGN float row[kLongestHead];
        loadQuery(head, r, row);
        for (int64_t d = 0; d < size; ++d)
        {
            panel.queries[d * kPanel + c] = row[d];
        }
    }
}

inline void closePanel(HeadView const& head, Panel const& panel, RowState* states)
{
    HWY_ALIGN float row[kLongestHead];
    for (int64_t c = 0; c < panel.end - panel.first; ++c)
    {
        for (int64_t d = 0; d < head.call->headSize; ++d)
        {
            row[d] = panel.sums[d * kPanel + c];
        }
        states[panel.first + c] = {panel.largest[c], panel.sum[c]};
        storeOutput(head, panel.first + c, row, 1.0f / panel.sum[c]);
    }
}

inline size_t panelFloats(int64_t size)
{
    return static_cast<size_t>((2 * size + 4) * kPanel);
}

inline size_t tilesScratch(int64_t size, int64_t rows)
{
    auto const panels = static_cast<size_t>((rows + kPanel - 1) / kPanel);
    return panels * panelFloats(size) + static_cast<size_t>(kBlock * kPanel + 2 * kBlock * padded(size));
}

template <class T>
void attendTilesOf(HeadView const& head, int64_t first, int64_t end, RowState* states, float* scratch)
{
    int64_t const size = head.call->headSize, panels = (end - first + kPanel - 1) / kPanel;
    float* products = scratch + panels * static_cast<int64_t>(panelFloats(size));
    float* keyCopy = products + kBlock * kPanel;
    float* valueCopy = keyCopy + kBlock * padded(size);
    auto const panel = [&](int64_t p) {
        float* at = scratch + p * static_cast<int64_t>(panelFloats(size));
        float* largest = at + 2 * size * kPanel;
        auto* from = reinterpret_cast<int32_t*>(largest + 2 * kPanel);
        int64_t const row = first + p * kPanel;
        return Panel{at, at + size * kPanel, largest, largest + kPanel, from, from + kPanel, row, std::min(row + kPanel, end)};
    };
    for (int64_t p = 0; p < panels; ++p)
    {
        openPanel(head, panel(p));
    }
    // Positions are slots, or named slots and then the new ones: what no row sees lies at both ends or is masked.
    Visible const low = visible(head, first), high = visible(head, end - 1);
    bool const contiguous = head.slots == nullptr;
    int64_t const start = contiguous ? low.first : 0;
    int64_t const stop = head.positions - (head.length + head.call->rows - high.end);
    Block block;
    for (int64_t at = start; at < stop; at += kBlock)
    {
        block.fill(head, at, stop);
        auto const* keys = static_cast<T const*>(head.keys);
        auto const* values = static_cast<T const*>(head.values);
        bool const scaled = head.keyScale != nullptr;
        float const* k = blockRows(keys, block, contiguous, scaled ? block.keyScale : nullptr, size, keyCopy);
        float const* v = blockRows(values, block, contiguous, scaled ? block.valueScale : nullptr, size, valueCopy);
        for (int64_t p = 0; p < panels; ++p)
        {
            Panel const now = panel(p);
            Visible const lowest = visible(head, now.first), highest = visible(head, now.end - 1);
            if (block.lowest >= highest.end || block.highest < lowest.first)
            {
                continue;
            }
            bool const all = block.allSeenBy({highest.first, lowest.end});
            addProducts(k, size, 1, block.count, now.queries, size, products, true);
            softmaxColumns(head, block, now, all, products);
            addProducts(v, 1, size, size, products, block.count, now.sums, false);
        }
    }
    for (int64_t p = 0; p < panels; ++p)
    {
        closePanel(head, panel(p), states);
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

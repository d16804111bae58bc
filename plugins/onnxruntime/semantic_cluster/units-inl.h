// Rows as float32, rotated by positions; keys of length 1, turned so that a vector has one channel of a tile's slots.
// Compiled once for each instruction set.
#if defined(SEMKV_UNITS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_UNITS_INL_H
#undef SEMKV_UNITS_INL_H
#else
#define SEMKV_UNITS_INL_H
#endif

#include "../simd/convert-inl.h"
#include "../simd/math-inl.h"
#include "kernels.h"

#include <vector>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// Sines and cosines of a position, for each frequency.
struct Turn
{
    std::vector<float> sine, cosine;

    // None for no frequencies.
    explicit Turn(int64_t frequencies)
        : sine(frequencies > 0 ? static_cast<size_t>(frequencies) + kLanes : 0)
        , cosine(sine.size())
    {
    }

    void set(SemanticClusterCall const& call, int64_t position)
    {
        auto const at = hn::Set(Floats(), static_cast<float>(position));
        for (int64_t i = 0; i < call.frequencies; i += kLanes)
        {
            auto const angle = hn::Mul(at, load(call.frequency + i, static_cast<size_t>(call.frequencies - i)));
            FloatVec sines, cosines;
            sineAndCosine(angle, sines, cosines);
            store(sines, sine.data() + i);
            store(cosines, cosine.data() + i);
        }
    }

    // Rotates a row by halves, forth, or back with sign -1.
    void apply(float* row, int64_t half, float sign) const
    {
        auto const signs = hn::Set(Floats(), sign);
        for (int64_t i = 0; i < half; i += kLanes)
        {
            auto const left = static_cast<size_t>(half - i);
            auto const first = load(row + i, left), second = load(row + half + i, left);
            auto const cosines = load(cosine.data() + i), sines = hn::Mul(load(sine.data() + i), signs);
            store(hn::NegMulAdd(second, sines, hn::Mul(first, cosines)), row + i, left);
            store(hn::MulAdd(first, sines, hn::Mul(second, cosines)), row + half + i, left);
        }
    }
};

// Makes a row's length 1; one of zeros stays.
HWY_INLINE void normalise(float* row, int64_t size)
{
    auto squares = hn::Zero(Floats());
    for (int64_t i = 0; i < size; i += kLanes)
    {
        auto const part = load(row + i, static_cast<size_t>(size - i));
        squares = hn::MulAdd(part, part, squares);
    }
    auto const square = hn::Set(Floats(), hn::ReduceSum(Floats(), squares));
    auto const norm = hn::Max(hn::Sqrt(square), hn::Set(Floats(), 1e-12f));
    for (int64_t i = 0; i < size; i += kLanes)
    {
        auto const left = static_cast<size_t>(size - i);
        store(hn::Div(load(row + i, left), norm), row + i, left);
    }
}

inline void loadUnits(Band const& band, int64_t tile)
{
    SemanticClusterCall const& call = *band.call;
    auto const lanes = static_cast<int64_t>(kLanes);
    float* const units = band.units + tile * band.width() * lanes;
    std::vector<float> row(static_cast<size_t>(call.size));
    Turn turn(call.frequencies);
    for (int64_t lane = 0; lane < lanes; ++lane)
    {
        int64_t const slot = band.first + tile * lanes + lane;
        if (!band.may[tile * lanes + lane])
        {
            for (int64_t d = 0; d < band.width(); ++d)
            {
                units[d * lanes + lane] = 0.0f;
            }
            continue;
        }
        if (call.position != nullptr)
        {
            turn.set(call, call.position[(band.batchRow * call.groups + band.group) * call.capacity + slot]);
        }
        for (int64_t h = 0; h < call.perGroup(); ++h)
        {
            int64_t const at = band.head(h) * call.capacity + slot;
            widenRow(call.element, call.keys.from, call.keys.scaleFrom, at, call.size, row.data());
            if (call.position != nullptr)
            {
                turn.apply(row.data(), call.frequencies, -1.0f);
            }
            normalise(row.data(), call.size);
            float* const to = units + h * call.size * lanes + lane;
            for (int64_t d = 0; d < call.size; ++d)
            {
                to[d * lanes] = row[static_cast<size_t>(d)];
            }
        }
    }
}

inline void mean(SemanticClusterCall const& call, CacheRows const& rows, int64_t head, Members const& members,
    int64_t const* position, int64_t to)
{
    // There are many clusters: memory of this thread that outlives the call.
    thread_local std::vector<float> row, sum;
    row.resize(static_cast<size_t>(call.size));
    sum.assign(row.size(), 0.0f);
    Turn turn(position == nullptr ? 0 : call.frequencies);
    for (int64_t slot = members.seed; slot >= 0; slot = members.next[slot])
    {
        widenRow(call.element, rows.from, rows.scaleFrom, head * call.capacity + slot, call.size, row.data());
        if (position != nullptr)
        {
            turn.set(call, position[slot]);
            turn.apply(row.data(), call.frequencies, -1.0f);
        }
        auto const weight = hn::Set(Floats(), members.weight[slot]);
        for (int64_t i = 0; i < call.size; i += kLanes)
        {
            auto const left = static_cast<size_t>(call.size - i);
            float* const at = sum.data() + i;
            store(hn::MulAdd(weight, load(row.data() + i, left), load(at, left)), at, left);
        }
    }
    auto const total = hn::Set(Floats(), members.total);
    for (int64_t i = 0; i < call.size; i += kLanes)
    {
        auto const left = static_cast<size_t>(call.size - i);
        store(hn::Div(load(sum.data() + i, left), total), sum.data() + i, left);
    }
    if (position != nullptr)
    {
        turn.set(call, position[members.seed]);
        turn.apply(sum.data(), call.frequencies, 1.0f);
    }
    narrowRow(call.element, sum.data(), rows.to, rows.scaleTo, head * call.capacity + to, call.size);
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

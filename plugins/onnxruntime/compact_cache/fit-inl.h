// Attention Matching: bounded least squares for biases, ridge regression for values, both solved in the queries. What is
// [slots,queries] has the queries in its vectors. Compiled once for each instruction set.
#if defined(SEMKV_FIT_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef SEMKV_FIT_INL_H
#undef SEMKV_FIT_INL_H
#else
#define SEMKV_FIT_INL_H
#endif

#include "../aligned.h"
#include "../simd/convert-inl.h"
#include "../simd/math-inl.h"
#include "../simd/matrix-inl.h"
#include "fit.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

HWY_BEFORE_NAMESPACE();
namespace semkv::native
{
namespace HWY_NAMESPACE
{
// As in semkv_deploy/methods/attention_matching.py.
constexpr int kFitSteps = 40;
constexpr float kFitRidge = 0.05f;
constexpr float kFitLargest = 3.0f;
constexpr float kFitTiny = 1e-20f;

// A matrix of whole vectors, 0 at first.
struct Matrix
{
    int64_t rows, columns;
    AlignedFloats data;

    Matrix(int64_t rows, int64_t columns)
        : rows(rows)
        , columns(columns)
        , data(alignedFloats(static_cast<size_t>(rows * columns)))
    {
        std::memset(data.get(), 0, static_cast<size_t>(rows * columns) * sizeof(float));
    }

    float* row(int64_t at) const { return data.get() + at * columns; }
    LeftFactor plain() const { return {data.get(), columns, 1}; }
    LeftFactor turned() const { return {data.get(), 1, columns}; }
};

constexpr int64_t wholeVectors(int64_t count)
{
    return (count + static_cast<int64_t>(kLanes) - 1) / static_cast<int64_t>(kLanes) * static_cast<int64_t>(kLanes);
}

// Calls code(i) for the first element of each vector of a row.
template <class Code>
HWY_INLINE void eachVector(int64_t columns, Code const& code)
{
    for (int64_t i = 0; i < columns; i += static_cast<int64_t>(kLanes))
    {
        code(i);
    }
}

HWY_INLINE FloatVec constant(float value)
{
    return hn::Set(Floats(), value);
}

// matrix^T x with (matrix matrix^T + ridge) x = wanted, of the matrix [queries,slots] whose transpose is `slots`; x alone is
// returned. Conjugate gradients of a fixed number of steps, for each column of `wanted` [queries,·].
inline Matrix solve(Matrix const& slots, int64_t used, Matrix const& wanted)
{
    int64_t const queries = slots.columns, width = wanted.columns;
    Matrix gram(queries, queries), solution(queries, width), residual(queries, width), direction(queries, width),
        image(queries, width);
    product(slots.turned(), queries, slots.rows, slots.data.get(), queries, queries, gram.data.get(), queries);
    float trace = 0.0f;
    for (int64_t r = 0; r < queries; ++r)
    {
        trace += gram.row(r)[r];
        std::copy_n(wanted.row(r), width, residual.row(r));
        std::copy_n(wanted.row(r), width, direction.row(r));
    }
    auto const ridge = constant(kFitRidge * (trace / static_cast<float>(used)));
    Matrix sums(3, width); // by column: the residual's square, the curvature, the next square
    float *const square = sums.row(0), *const curvature = sums.row(1), *const next = sums.row(2);
    for (int64_t r = 0; r < queries; ++r)
    {
        eachVector(width, [&](int64_t i) {
            auto const part = load(residual.row(r) + i);
            store(hn::MulAdd(part, part, load(square + i)), square + i);
        });
    }
    for (int step = 0; step < kFitSteps; ++step)
    {
        product(gram.plain(), queries, queries, direction.data.get(), width, width, image.data.get(), width);
        std::fill(curvature, curvature + width, 0.0f);
        std::fill(next, next + width, 0.0f);
        for (int64_t r = 0; r < queries; ++r)
        {
            eachVector(width, [&](int64_t i) {
                auto const along = load(direction.row(r) + i);
                auto const damped = hn::MulAdd(ridge, along, load(image.row(r) + i));
                store(damped, image.row(r) + i);
                store(hn::MulAdd(along, damped, load(curvature + i)), curvature + i);
            });
        }
        for (int64_t r = 0; r < queries; ++r)
        {
            eachVector(width, [&](int64_t i) {
                auto const length = hn::Div(load(square + i), hn::Max(load(curvature + i), constant(kFitTiny)));
                store(hn::MulAdd(length, load(direction.row(r) + i), load(solution.row(r) + i)), solution.row(r) + i);
                auto const left = hn::NegMulAdd(length, load(image.row(r) + i), load(residual.row(r) + i));
                store(left, residual.row(r) + i);
                store(hn::MulAdd(left, left, load(next + i)), next + i);
            });
        }
        for (int64_t r = 0; r < queries; ++r)
        {
            eachVector(width, [&](int64_t i) {
                auto const share = hn::Div(load(next + i), hn::Max(load(square + i), constant(kFitTiny)));
                store(hn::MulAdd(share, load(direction.row(r) + i), load(residual.row(r) + i)), direction.row(r) + i);
            });
        }
        std::copy_n(next, width, square);
    }
    return solution;
}

// Rows first..first+count-1 of a cache as float32.
inline Matrix wideRows(FitHead const& head, void const* rows, float const* scales)
{
    Matrix wide(head.length, wholeVectors(head.size));
    for (int64_t slot = 0; slot < head.length; ++slot)
    {
        widenRow(head.element, rows, scales, head.first + slot, head.size, wide.row(slot));
    }
    return wide;
}

// Queries that are there [D,queries], turned; columns behind the last are 0.
inline Matrix usedQueries(FitHead const& head, int64_t& used)
{
    std::vector<float const*> there;
    for (int64_t r = 0; r < head.queryCount; ++r)
    {
        float const* const query = head.queries + r * head.size;
        if (std::any_of(query, query + head.size, [](float each) { return each != 0.0f; }))
        {
            there.push_back(query);
        }
    }
    used = static_cast<int64_t>(there.size());
    Matrix turned(wholeVectors(head.size), wholeVectors(used));
    for (int64_t r = 0; r < used; ++r)
    {
        for (int64_t d = 0; d < head.size; ++d)
        {
            turned.row(d)[r] = there[static_cast<size_t>(r)][d];
        }
    }
    return turned;
}

// The attention [slots,queries] that queries give the whole cache, 0 in columns of no query. `largest` [1,queries] becomes
// the largest logit, `mass` the sum of exponentials relative to it, 1 where there is no query.
inline Matrix attention(FitHead const& head, Matrix const& queries, int64_t used, Matrix const& keys, Matrix& largest,
    Matrix& mass)
{
    int64_t const columns = queries.columns;
    Matrix weights(head.length, columns);
    product(keys.plain(), head.length, keys.columns, queries.data.get(), columns, columns, weights.data.get(), columns);
    std::fill(largest.row(0), largest.row(0) + columns, std::numeric_limits<float>::lowest());
    for (int64_t slot = 0; slot < head.length; ++slot)
    {
        eachVector(columns, [&](int64_t i) {
            auto const logit = hn::Add(load(weights.row(slot) + i), constant(head.bias[slot]));
            store(logit, weights.row(slot) + i);
            store(hn::Max(load(largest.row(0) + i), logit), largest.row(0) + i);
        });
    }
    for (int64_t slot = 0; slot < head.length; ++slot)
    {
        eachVector(columns, [&](int64_t i) {
            auto const weight = exponential(hn::Sub(load(weights.row(slot) + i), load(largest.row(0) + i)));
            store(weight, weights.row(slot) + i);
            store(hn::Add(load(mass.row(0) + i), weight), mass.row(0) + i);
        });
    }
    Matrix factor(1, columns);
    for (int64_t r = 0; r < columns; ++r)
    {
        factor.row(0)[r] = r < used ? 1.0f / mass.row(0)[r] : 0.0f;
    }
    for (int64_t slot = 0; slot < head.length; ++slot)
    {
        eachVector(columns, [&](int64_t i) {
            store(hn::Mul(load(weights.row(slot) + i), load(factor.row(0) + i)), weights.row(slot) + i);
        });
    }
    return weights;
}

// Grows the biases of the slots that stay, so that queries give them all of their attention; returns by how much each
// counts more. `shares` [slots that stay, queries].
inline std::vector<float> fitBiases(FitHead const& head, Matrix const& shares, int64_t used)
{
    Matrix lost(shares.columns, static_cast<int64_t>(kLanes)); // one column is wanted, the others are 0
    for (int64_t r = 0; r < used; ++r)
    {
        lost.row(r)[0] = 1.0f;
    }
    for (int64_t j = 0; j < head.count; ++j)
    {
        for (int64_t r = 0; r < used; ++r)
        {
            lost.row(r)[0] -= shares.row(j)[r];
        }
    }
    Matrix const solution = solve(shares, used, lost);
    float const least = std::exp(-kFitLargest), most = std::exp(kFitLargest);
    std::vector<float> counted(static_cast<size_t>(head.count));
    for (int64_t j = 0; j < head.count; ++j)
    {
        float more = 0.0f;
        for (int64_t r = 0; r < used; ++r)
        {
            more += shares.row(j)[r] * solution.row(r)[0];
        }
        float const within = std::min(std::max(1.0f + more, least), most);
        counted[static_cast<size_t>(j)] = within;
        head.biasOut[j] += std::log(within);
    }
    return counted;
}

// Shares become the softmax over the slots that stay, with their new biases.
inline void renormalise(FitHead const& head, Matrix& shares, std::vector<float> const& counted, int64_t used,
    Matrix const& queries, Matrix const& keys)
{
    Matrix total(1, shares.columns);
    for (int64_t j = 0; j < head.count; ++j)
    {
        auto const times = constant(counted[static_cast<size_t>(j)]);
        eachVector(shares.columns, [&](int64_t i) {
            auto const weight = hn::Mul(load(shares.row(j) + i), times);
            store(weight, shares.row(j) + i);
            store(hn::Add(load(total.row(0) + i), weight), total.row(0) + i);
        });
    }
    for (int64_t r = 0; r < used; ++r)
    {
        float& sum = total.row(0)[r];
        if (sum > 1e-30f)
        {
            sum = 1.0f / sum;
            continue;
        }
        // What stays had next to none of this query's attention: its logits relative to their own largest.
        std::vector<double> logits(static_cast<size_t>(head.count));
        for (int64_t j = 0; j < head.count; ++j)
        {
            double logit = head.biasOut[j];
            for (int64_t d = 0; d < head.size; ++d)
            {
                logit += static_cast<double>(queries.row(d)[r]) * keys.row(head.kept[j])[d];
            }
            logits[static_cast<size_t>(j)] = logit;
        }
        double const largest = *std::max_element(logits.begin(), logits.end());
        double all = 0;
        for (int64_t j = 0; j < head.count; ++j)
        {
            double const weight = std::exp(logits[static_cast<size_t>(j)] - largest);
            shares.row(j)[r] = static_cast<float>(weight);
            all += weight;
        }
        sum = static_cast<float>(1.0 / all);
    }
    for (int64_t j = 0; j < head.count; ++j)
    {
        eachVector(shares.columns, [&](int64_t i) {
            store(hn::Mul(load(shares.row(j) + i), load(total.row(0) + i)), shares.row(j) + i);
        });
    }
}

// Changes the values of the slots that stay, so that with these weights queries get the whole cache's output.
inline void fitTheValues(FitHead const& head, Matrix const& weights, Matrix& whole, int64_t used)
{
    Matrix const values = wideRows(head, head.values, head.valueScale);
    int64_t const queries = weights.columns, width = values.columns;
    // The whole cache's output less that of what stays is one sum over the whole cache.
    for (int64_t j = 0; j < head.count; ++j)
    {
        float* const row = whole.row(head.kept[j]);
        eachVector(queries, [&](int64_t i) { store(hn::Sub(load(row + i), load(weights.row(j) + i)), row + i); });
    }
    Matrix lost(queries, width), change(head.count, width);
    product(whole.turned(), queries, head.length, values.data.get(), width, width, lost.data.get(), width);
    Matrix const solution = solve(weights, used, lost);
    product(weights.plain(), head.count, queries, solution.data.get(), width, width, change.data.get(), width);
    for (int64_t j = 0; j < head.count; ++j)
    {
        eachVector(width, [&](int64_t i) {
            store(hn::Add(load(values.row(head.kept[j]) + i), load(change.row(j) + i)), change.row(j) + i);
        });
        narrowRow(head.element, change.row(j), head.valuesOut, head.valueScaleOut, head.first + j, head.size);
    }
}

inline void fit(FitHead const& head)
{
    int64_t used = 0;
    Matrix const queries = usedQueries(head, used);
    if (used == 0 || head.count == 0)
    {
        return;
    }
    Matrix const keys = wideRows(head, head.keys, head.keyScale);
    Matrix largest(1, queries.columns), mass(1, queries.columns);
    Matrix whole = attention(head, queries, used, keys, largest, mass);
    Matrix shares(head.count, queries.columns);
    for (int64_t j = 0; j < head.count; ++j)
    {
        std::copy_n(whole.row(head.kept[j]), queries.columns, shares.row(j));
    }
    std::vector<float> const counted = fitBiases(head, shares, used);
    if (head.fitValues)
    {
        renormalise(head, shares, counted, used, queries, keys);
        fitTheValues(head, shares, whole, used);
    }
}
} // namespace HWY_NAMESPACE
} // namespace semkv::native
HWY_AFTER_NAMESPACE();

#endif

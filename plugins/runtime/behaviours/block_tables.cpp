#include "behaviours/blocks.h"

#include <algorithm>

namespace semkv::runtime
{
BlockTabulator::BlockTabulator(BlockRule const& rule, Engine& engine, Slots& slots)
    : Segmenting(rule, engine, slots)
    , mEnds(static_cast<size_t>(slots.batch * rule.most), 0)
{
}

void BlockTabulator::stepInputs(int64_t row, Feeds& feeds) const
{
    int64_t const first = row == kEveryRow ? 0 : row, count = row == kEveryRow ? mSlots.batch : 1;
    auto const begin = mEnds.begin() + first * mRule.most;
    feeds[mRule.input] = Array::of({count, mRule.most}, Ids(begin, begin + count * mRule.most));
}

void BlockTabulator::appended(int64_t row, int64_t const* ids, size_t count)
{
    Segmenter const& segmenter = mSegmenters[static_cast<size_t>(row)];
    int64_t* const of = ends(row);
    int64_t const first = segmenter.closed, start = first > 0 ? of[first - 1] : 0;
    Ids const lengths = cut(row, ids, count);
    if (segmenter.closed >= mRule.most)
    {
        throw Error(SEMKV_BAD_BUNDLE, "more blocks than the table has rows")
            .where("row " + std::to_string(row))
            .expected("at most " + std::to_string(mRule.most))
            .got(std::to_string(segmenter.closed));
    }
    int64_t end = start;
    for (size_t i = 0; i < lengths.size(); ++i)
    {
        of[first + static_cast<int64_t>(i)] = end += lengths[i];
    }
    if (!lengths.empty())
    {
        map(row, first, start, lengths);
    }
    of[segmenter.closed] = segmenter.open.empty() ? 0 : mSlots.at(row);
}

// Runs the program for blocks that lie one after the other. A block that a failed call closed was mapped where the next
// one that closes will be: nothing has to be undone there.
void BlockTabulator::map(int64_t row, int64_t first, int64_t start, Ids const& lengths)
{
    Timed const timed(stats.seconds);
    Shape const shape{mSlots.batch, mRule.closed};
    Array begins(Type::kInt64, shape), length(Type::kInt64, shape), number(Type::kInt64, shape);
    std::fill_n(number.as<int64_t>(), elements(shape), mRule.most - 1);
    for (size_t i = 0; i < std::min(lengths.size(), static_cast<size_t>(mRule.closed)); ++i)
    {
        int64_t const at = row * mRule.closed + static_cast<int64_t>(i);
        begins.as<int64_t>()[at] = start;
        length.as<int64_t>()[at] = lengths[i];
        number.as<int64_t>()[at] = first + static_cast<int64_t>(i);
        start += lengths[i];
    }
    std::map<size_t, Feeds> feeds;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        feeds[group] = {{"block_start", begins}, {"block_length", length}, {"block_number", number}};
    }
    mEngine.runGroups(mRule.program, feeds);
}

void BlockTabulator::reset(Rows const& rows)
{
    Segmenting::reset(rows);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            std::fill_n(ends(static_cast<int64_t>(row)), mRule.most, 0);
        }
    }
}

Feeds BlockTabulator::state(int64_t first, int64_t last) const
{
    Feeds held = Segmenting::state(first, last);
    auto const begin = mEnds.begin();
    held["ends"] = Array::of({last - first, mRule.most}, Ids(begin + first * mRule.most, begin + last * mRule.most));
    return held;
}

void BlockTabulator::restore(Feeds const& state, int64_t first)
{
    Segmenting::restore(state, first);
    Array const& saved = state.at("ends");
    std::transform(saved.as<int64_t>(), saved.as<int64_t>() + elements(saved.shape), ends(first),
        [&](int64_t end) { return std::clamp<int64_t>(end, 0, mContract.maxContext); });
    for (int64_t number = 0; number < saved.shape[0]; ++number)
    {
        // An index into the table: a file that says otherwise was not saved by a session.
        int64_t& closed = mSegmenters[static_cast<size_t>(first + number)].closed;
        closed = std::clamp<int64_t>(closed, 0, mRule.most - 1);
    }
}

void BlockTabulator::restored(int64_t row)
{
    Segmenter const& segmenter = mSegmenters[static_cast<size_t>(row)];
    int64_t* const of = ends(row);
    std::fill(of + segmenter.closed, of + mRule.most, 0);
    of[segmenter.closed] = segmenter.open.empty() ? 0 : mSlots.at(row);
}
} // namespace semkv::runtime

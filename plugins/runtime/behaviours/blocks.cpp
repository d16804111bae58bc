#include "behaviours/blocks.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
constexpr int64_t kLargestSum = int64_t{1} << 60; // no conversation's log shares come to more
} // namespace

Segmenting::Segmenting(BlockRule const& rule, Engine& engine, Slots& slots)
    : Behaviour(engine, slots)
    , mRule(rule)
    , mCodes(codesOf(rule, slots.isDelimiter))
    , mSegmenters(static_cast<size_t>(slots.batch), Segmenter{{}, Ids(rule.domains.size(), 0), 0})
    , mBegun(mSegmenters)
{
}

void Segmenting::reset(Rows const& rows)
{
    Behaviour::reset(rows);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            mSegmenters[row] = {{}, Ids(mRule.domains.size(), 0), 0};
        }
    }
}

Ids Segmenting::cut(int64_t row, int64_t const* ids, size_t count)
{
    Ids lengths;
    for (size_t i = 0; i < count; ++i)
    {
        int64_t const length = mSegmenters[static_cast<size_t>(row)].append(mRule, mCodes[static_cast<size_t>(ids[i])]);
        if (length > 0)
        {
            lengths.push_back(length);
        }
    }
    return lengths;
}

Feeds Segmenting::state(int64_t first, int64_t last) const
{
    int64_t const count = last - first, domains = static_cast<int64_t>(mRule.domains.size());
    Ids open, sums, closed;
    for (size_t row = static_cast<size_t>(first); row < static_cast<size_t>(last); ++row)
    {
        Segmenter const& segmenter = mSegmenters[row];
        open.insert(open.end(), segmenter.open.begin(), segmenter.open.end());
        open.resize(
            (row - static_cast<size_t>(first) + 1) * static_cast<size_t>(mRule.longest()), Segmenter::kTurn - 1);
        sums.insert(sums.end(), segmenter.sums.begin(), segmenter.sums.end());
        closed.push_back(segmenter.closed);
    }
    return {{"open", Array::of({count, mRule.longest()}, open)}, {"sums", Array::of({count, domains}, sums)},
        {"closed", Array::of({count}, closed)}};
}

void Segmenting::restore(Feeds const& state, int64_t first)
{
    Array const& open = state.at("open");
    int64_t const most = static_cast<int64_t>(mRule.tokenIds.size());
    for (int64_t number = 0; number < open.shape[0]; ++number)
    {
        Segmenter& segmenter = mSegmenters[static_cast<size_t>(first + number)];
        int64_t const* const codes = open.as<int64_t>() + number * open.shape[1];
        // A file that says otherwise was not saved by a session: what no block can be is not taken.
        int64_t held = 0;
        while (held < mRule.longest() - 1 && codes[held] >= Segmenter::kTurn && codes[held] <= most)
        {
            ++held;
        }
        segmenter.open.assign(codes, codes + held);
        int64_t const* const sums
            = state.at("sums").as<int64_t>() + number * static_cast<int64_t>(mRule.domains.size());
        segmenter.sums.assign(sums, sums + mRule.domains.size());
        for (int64_t& sum : segmenter.sums)
        {
            sum = std::clamp(sum, -kLargestSum, kLargestSum);
        }
        segmenter.closed = std::clamp<int64_t>(state.at("closed").as<int64_t>()[number], 0, mContract.maxContext);
    }
}

void Segmenting::beginTurn(Rows const& rows)
{
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            mBegun[row] = mSegmenters[row];
        }
    }
}

void Segmenting::takenBack(int64_t row)
{
    mSegmenters[static_cast<size_t>(row)] = mBegun[static_cast<size_t>(row)];
    restored(row);
}

std::any Segmenting::snapshot() const
{
    return mSegmenters;
}

void Segmenting::takeBack(std::any const& snapshot)
{
    auto const& before = std::any_cast<std::vector<Segmenter> const&>(snapshot);
    for (size_t row = 0; row < before.size(); ++row)
    {
        if (!(mSegmenters[row] == before[row]))
        {
            mSegmenters[row] = before[row];
            restored(static_cast<int64_t>(row));
        }
    }
}

void BlockKeeper::appended(int64_t row, int64_t const* ids, size_t count)
{
    Segmenter const& segmenter = mSegmenters[static_cast<size_t>(row)];
    size_t const before = segmenter.open.size();
    int64_t number = segmenter.closed;
    Ids const lengths = cut(row, ids, count);
    Ids numbers;
    for (int64_t const length : lengths)
    {
        numbers.insert(numbers.end(), static_cast<size_t>(length), number++);
    }
    numbers.insert(numbers.end(), segmenter.open.size(), number);
    // A token that was open before and still is has its number already.
    if (lengths.empty())
    {
        numbers.erase(numbers.begin(), numbers.begin() + static_cast<std::ptrdiff_t>(before));
    }
    write(row, numbers);
}

void BlockKeeper::restored(int64_t row)
{
    Segmenter const& segmenter = mSegmenters[static_cast<size_t>(row)];
    write(row, Ids(segmenter.open.size(), segmenter.closed));
}

void BlockKeeper::write(int64_t row, Ids const& numbers)
{
    int64_t const count = static_cast<int64_t>(numbers.size()), first = mSlots.at(row) - count;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        Column& column = mSlots.column(mRule.column)[group];
        Column const& position = mSlots.column("slot_position")[group];
        int64_t const live = mSlots.length(group, row);
        for (int64_t head = 0; head < column.heads; ++head)
        {
            int64_t* const written = column.slots(row, head);
            int64_t const* const at = position.slots(row, head < position.heads ? head : 0);
            for (int64_t slot = std::max<int64_t>(live - count, 0); slot < live; ++slot)
            {
                if (at[slot] >= first && at[slot] < first + count)
                {
                    written[slot] = numbers[static_cast<size_t>(at[slot] - first)];
                }
            }
        }
    }
}
} // namespace semkv::runtime

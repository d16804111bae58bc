#include "behaviours/slot_tables.h"

#include <algorithm>

namespace semkv::runtime
{
Ids blockEnds(int64_t const* numbers, int64_t live, int64_t join)
{
    Ids ends;
    for (int64_t slot = 1; slot <= live; ++slot)
    {
        if (slot < live && numbers[slot] == numbers[slot - 1])
        {
            continue;
        }
        int64_t const start = ends.size() > 1 ? ends[ends.size() - 2] : 0;
        if (!ends.empty() && slot < live && slot - start <= join)
        {
            ends.back() = slot;
        }
        else
        {
            ends.push_back(slot);
        }
    }
    return ends;
}

SlotTabulator::SlotTabulator(SlotTables const& spec, Engine& engine, Slots& slots)
    : Behaviour(engine, slots)
    , mSpec(spec)
    , mLength(slots.lengths.size(), 0)
    , mNumber(static_cast<size_t>(slots.batch), -1)
{
    for (CacheGroup const& group : mContract.groups)
    {
        mFirst.push_back(mHeads);
        mHeads += group.heads;
    }
    mEnds.assign(static_cast<size_t>(elements({slots.batch, mHeads, mSpec.most})), 0);
    mMapped = mEnds;
}

void SlotTabulator::stepInputs(int64_t row, Feeds& feeds) const
{
    int64_t const first = row == kEveryRow ? 0 : row, rows = row == kEveryRow ? mSlots.batch : 1;
    auto const begin = mEnds.begin() + first * mHeads * mSpec.most;
    feeds[mSpec.input] = Array::of({rows, mHeads, mSpec.most}, Ids(begin, begin + rows * mHeads * mSpec.most));
}

void SlotTabulator::beforeAppend(Ids const&)
{
    follow(-1, 0);
}

void SlotTabulator::appended(int64_t row, int64_t const*, size_t count)
{
    follow(row, static_cast<int64_t>(count));
}

void SlotTabulator::endTurn(Rows const&)
{
    follow(-1, 0);
}

void SlotTabulator::compress(Rows const&)
{
    follow(-1, 0);
}

void SlotTabulator::reset(Rows const& rows)
{
    Behaviour::reset(rows);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            forget(static_cast<int64_t>(row));
        }
    }
}

void SlotTabulator::restore(Feeds const&, int64_t)
{
    // Which rows were loaded is not said; a row that was not is mapped again as it was.
    takeBack({});
}

void SlotTabulator::takeBack(std::any const&)
{
    for (int64_t row = 0; row < mSlots.batch; ++row)
    {
        forget(row);
    }
}

void SlotTabulator::forget(int64_t row)
{
    std::fill_n(of(mEnds, row, 0), mHeads * mSpec.most, 0);
    std::fill_n(of(mMapped, row, 0), mHeads * mSpec.most, 0);
    mNumber[static_cast<size_t>(row)] = -1;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        mLength[group * static_cast<size_t>(mSlots.batch) + static_cast<size_t>(row)] = 0;
    }
}

int64_t SlotTabulator::lastNumber(int64_t row) const
{
    int64_t const live = mSlots.length(0, row);
    return live > 0 ? mSlots.column(mSpec.column)[0].slots(row, 0)[live - 1] : -1;
}

void SlotTabulator::follow(int64_t grown, int64_t count)
{
    size_t const batch = static_cast<size_t>(mSlots.batch);
    for (int64_t row = 0; row < mSlots.batch; ++row)
    {
        bool changed = false, extended = row == grown && lastNumber(row) == mNumber[static_cast<size_t>(row)];
        for (size_t group = 0; group < mSlots.groups; ++group)
        {
            int64_t const before = mLength[group * batch + static_cast<size_t>(row)], now = mSlots.length(group, row);
            changed = changed || now != before;
            extended = extended && before > 0 && now - before == count;
        }
        for (size_t group = 0; changed && group < mSlots.groups; ++group)
        {
            int64_t& before = mLength[group * batch + static_cast<size_t>(row)];
            int64_t const now = mSlots.length(group, row);
            int64_t* const ends = of(mEnds, row, mFirst[group]);
            int64_t const size = mContract.groups[group].heads * mSpec.most;
            if (extended)
            {
                std::replace(ends, ends + size, int64_t{before}, now);
            }
            else
            {
                if (now < before)
                {
                    std::fill_n(of(mMapped, row, mFirst[group]), size, 0);
                }
                table(row, group);
            }
            before = now;
        }
        if (changed && !extended)
        {
            mNumber[static_cast<size_t>(row)] = lastNumber(row);
            map(row);
        }
    }
}

void SlotTabulator::table(int64_t row, size_t group)
{
    Column const& column = mSlots.column(mSpec.column)[group];
    for (int64_t head = 0; head < mContract.groups[group].heads; ++head)
    {
        Ids const ends = blockEnds(column.slots(row, head), mSlots.length(group, row), mSpec.join);
        if (static_cast<int64_t>(ends.size()) >= mSpec.most)
        {
            throw Error(SEMKV_BAD_BUNDLE, "more blocks than the table has rows")
                .where("row " + std::to_string(row))
                .expected("less than " + std::to_string(mSpec.most))
                .got(std::to_string(ends.size()));
        }
        int64_t* const to = of(mEnds, row, mFirst[group] + head);
        std::fill(std::copy(ends.begin(), ends.end(), to), to + mSpec.most, 0);
    }
}

void SlotTabulator::map(int64_t row)
{
    Timed const timed(stats.seconds);
    std::vector<Ids> wanted(static_cast<size_t>(mHeads));
    size_t longest = 0;
    for (int64_t head = 0; head < mHeads; ++head)
    {
        int64_t const *const ends = of(mEnds, row, head), *const mapped = of(mMapped, row, head);
        Ids& blocks = wanted[static_cast<size_t>(head)];
        for (int64_t n = 0; n + 1 < mSpec.most && ends[n + 1] > 0; ++n)
        {
            if (ends[n] != mapped[n] || (n > 0 && ends[n - 1] != mapped[n - 1]))
            {
                blocks.push_back(n);
            }
        }
        longest = std::max(longest, blocks.size());
    }
    size_t const closed = static_cast<size_t>(mSpec.closed);
    for (size_t first = 0; first < longest; first += closed)
    {
        std::map<size_t, Feeds> feeds;
        for (size_t group = 0; group < mSlots.groups; ++group)
        {
            int64_t const heads = mContract.groups[group].heads;
            Shape const shape{mSlots.batch, heads, mSpec.closed};
            Array start(Type::kInt64, shape), length(Type::kInt64, shape), number(Type::kInt64, shape);
            std::fill_n(number.as<int64_t>(), elements(shape), mSpec.most - 1);
            bool any = false;
            for (int64_t head = 0; head < heads; ++head)
            {
                Ids const& blocks = wanted[static_cast<size_t>(mFirst[group] + head)];
                int64_t const* const ends = of(mEnds, row, mFirst[group] + head);
                for (size_t i = first; i < std::min(blocks.size(), first + closed); ++i)
                {
                    int64_t const n = blocks[i], begin = n > 0 ? ends[n - 1] : 0;
                    int64_t const at = (row * heads + head) * mSpec.closed + static_cast<int64_t>(i - first);
                    start.as<int64_t>()[at] = begin;
                    length.as<int64_t>()[at] = ends[n] - begin;
                    number.as<int64_t>()[at] = n;
                    any = true;
                }
            }
            if (any)
            {
                feeds[group] = {{"block_start", start}, {"block_length", length}, {"block_number", number}};
            }
        }
        mEngine.runGroups(mSpec.program, feeds);
    }
    for (int64_t head = 0; head < mHeads; ++head)
    {
        // Blocks but the last, which is open.
        int64_t const* const ends = of(mEnds, row, head);
        int64_t* const mapped = of(mMapped, row, head);
        for (int64_t n = 0; n < mSpec.most; ++n)
        {
            mapped[n] = n + 1 < mSpec.most && ends[n + 1] > 0 ? ends[n] : 0;
        }
    }
}
} // namespace semkv::runtime

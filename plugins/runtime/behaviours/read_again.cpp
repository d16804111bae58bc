#include "behaviours/read_again.h"

#include <algorithm>

namespace semkv::runtime
{
Rereader::Rereader(ReadAgain const& spec, Engine& engine, Slots& slots)
    : Behaviour(engine, slots)
    , mSpec(spec)
    , mUnread(static_cast<size_t>(slots.batch))
    , mUntil(static_cast<size_t>(slots.batch), 0)
{
}

void Rereader::beginTurn(Rows const& rows)
{
    for (Behaviour const* other : others)
    {
        read(other->finishes(rows));
    }
}

void Rereader::beforeAppend(Ids const& count)
{
    Rows rows(count.size(), 0);
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t const length = mSlots.length(group, static_cast<int64_t>(row));
            rows[row] |= length + count[row] > mContract.groups[group].capacity - mSpec.piece;
        }
    }
    read(rows);
}

size_t Rereader::unreadBefore(int64_t row, int64_t position) const
{
    size_t const r = static_cast<size_t>(row);
    int64_t const held = static_cast<int64_t>(mUnread[r].size());
    return static_cast<size_t>(std::clamp<int64_t>(held - (mUntil[r] - position), 0, held));
}

void Rereader::appended(int64_t row, int64_t const* ids, size_t count)
{
    size_t const r = static_cast<size_t>(row);
    mUnread[r].resize(unreadBefore(row, mSlots.at(row) - static_cast<int64_t>(count)));
    mUnread[r].insert(mUnread[r].end(), ids, ids + count);
    mUntil[r] = mSlots.at(row);
}

void Rereader::endTurn(Rows const& rows)
{
    if (mSpec.atTurns)
    {
        read(rows);
    }
}

void Rereader::compress(Rows const& rows)
{
    read(rows);
}

void Rereader::reset(Rows const& rows)
{
    Behaviour::reset(rows);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (rows[row])
        {
            mUnread[row].clear();
            mUntil[row] = 0;
        }
    }
}

Feeds Rereader::state(int64_t first, int64_t last) const
{
    Array unread(Type::kInt64, {last - first, mContract.maxContext});
    std::fill_n(unread.as<int64_t>(), elements(unread.shape), -1);
    for (int64_t row = first; row < last; ++row)
    {
        size_t const count = unreadBefore(row, mSlots.at(row));
        std::copy_n(mUnread[static_cast<size_t>(row)].data(), count,
            unread.as<int64_t>() + (row - first) * mContract.maxContext);
    }
    return {{"unread", unread}};
}

void Rereader::restore(Feeds const& state, int64_t first)
{
    Array const& unread = state.at("unread");
    for (int64_t number = 0; number < unread.shape[0]; ++number)
    {
        size_t const row = static_cast<size_t>(first + number);
        int64_t const* const ids = unread.as<int64_t>() + number * unread.shape[1];
        // A file that says otherwise was not saved by a session: what it names is not read.
        int64_t count = 0;
        while (count < unread.shape[1] && count < mSlots.position[row] && ids[count] >= 0
            && ids[count] < mContract.vocabSize)
        {
            ++count;
        }
        mUnread[row].assign(ids, ids + count);
        mUntil[row] = mSlots.position[row];
    }
}

void Rereader::read(Rows const& rows)
{
    Timed const timed(stats.seconds);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        int64_t const r = static_cast<int64_t>(row);
        size_t const count = rows[row] ? unreadBefore(r, mSlots.at(r)) : 0;
        if (count == 0)
        {
            continue;
        }
        size_t const piece = static_cast<size_t>(mSpec.piece);
        int64_t const runs = static_cast<int64_t>((count + piece - 1) / piece);
        for (size_t start = 0; start < count; start += piece)
        {
            run(r, mUnread[row].data() + start, std::min(piece, count - start), static_cast<int64_t>(start / piece) + 1,
                runs);
        }
        mUnread[row].clear();
        mUntil[row] = mSlots.at(r);
        ++stats.runs;
    }
}

// Runs ids behind the row's live slots; counts nothing.
void Rereader::run(int64_t row, int64_t const* ids, size_t count, int64_t number, int64_t runs)
{
    // Positions stay within the conversation's, which the model is known to take.
    int64_t const position = std::min(mSlots.at(row), mContract.maxContext - mSpec.piece);
    int64_t const tokens = static_cast<int64_t>(count);
    Ids positions;
    for (int64_t i = 0; i < tokens; ++i)
    {
        positions.push_back(position + i);
    }
    Feeds feeds;
    for (StepInput const& input : mContract.stepInputs)
    {
        feeds[input.name] = Array(Type::kInt64, input.shape(1));
    }
    feeds["input_ids"] = Array::of({1, tokens}, Ids(ids, ids + count));
    feeds["position_ids"] = Array::of({1, tokens}, positions);
    feeds["logits_index"] = Array::of({1, 1}, {0});
    feeds["length"] = mSlots.lengthsOf(row);
    feeds[mSpec.input] = Array::of({2}, {number, runs});
    for (Behaviour const* other : others)
    {
        other->stepInputs(row, feeds);
    }
    mEngine.run(mSpec.program, feeds, row);
}
} // namespace semkv::runtime

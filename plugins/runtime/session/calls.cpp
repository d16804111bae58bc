// What calls of a session share: what they refuse, and how one that fails is undone; and the calls
// that append nothing.
#include "session/session.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
char const* const kBroken = "an earlier call failed after part of it was appended";
} // namespace

Rows Session::mask(int64_t row) const
{
    if (row == kEveryRow)
    {
        return Rows(mOpen.size(), 1);
    }
    if (row < 0 || row >= batch())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "no such row")
            .where("row")
            .expected("0 to " + std::to_string(batch() - 1) + ", or -1 for all")
            .got(std::to_string(row));
    }
    Rows rows(mOpen.size(), 0);
    rows[static_cast<size_t>(row)] = 1;
    return rows;
}

void Session::checkIds(Ids const& ids, char const* where) const
{
    for (int64_t const id : ids)
    {
        if (id < 0 || id >= mContract.vocabSize)
        {
            throw Error(SEMKV_BAD_ARGUMENT, "no token of the model has this id")
                .where(where)
                .expected("0 to " + std::to_string(mContract.vocabSize - 1))
                .got(std::to_string(id));
        }
    }
}

void Session::checkBroken(int64_t row) const
{
    if (mBroken[static_cast<size_t>(row)])
    {
        throw Error(SEMKV_NEEDS_RESET, kBroken)
            .where("row " + std::to_string(row))
            .fix("reset the row, or the session");
    }
}

bool Session::refused(int64_t row, int64_t count, bool fails) const
{
    if (count == 0)
    {
        return false;
    }
    std::string const name = batch() > 1 ? "row " + std::to_string(row) : "prompt";
    if (fails)
    {
        checkBroken(row);
    }
    int64_t due = 0;
    bool makesRoom = false;
    for (auto const& behaviour : mBehaviours)
    {
        due += behaviour->due(row);
        makesRoom = makesRoom || behaviour->makesRoom();
    }
    int64_t const seen = mSlots.at(row) + due;
    if (seen + count > mContract.maxContext)
    {
        if (!fails)
        {
            return true;
        }
        throw Error(SEMKV_CONTEXT_FULL, std::to_string(count) + " more tokens do not fit the context")
            .where(name)
            .expected("at most " + std::to_string(mContract.maxContext) + " tokens in all")
            .got(std::to_string(seen) + " + " + std::to_string(count))
            .fix("shorten the conversation, or build with a larger --max-context");
    }
    for (size_t group = 0; !makesRoom && group < mSlots.groups; ++group)
    {
        if (mSlots.length(group, row) + count > mContract.groups[group].capacity)
        {
            if (!fails)
            {
                return true;
            }
            throw Error(SEMKV_CACHE_FULL, "the cache is full and the method does not compress")
                .where(name)
                .expected("at most " + std::to_string(mContract.groups[group].capacity) + " tokens")
                .got(std::to_string(mSlots.kept(row)) + " + " + std::to_string(count))
                .fix("use a method that compresses, or a larger --max-context");
        }
    }
    return mBroken[static_cast<size_t>(row)] != 0;
}

void Session::goOn() const
{
    if (mCancelled)
    {
        throw Error(SEMKV_CANCELLED, "the call was cancelled");
    }
}

Session::Counters Session::counted() const
{
    Counters before{mSlots.position, mSlots.lengths, mSlots.chunks, {}, {}};
    for (auto const& behaviour : mBehaviours)
    {
        before.changes.push_back(behaviour->changes);
        before.behaviours.push_back(behaviour->snapshot());
    }
    return before;
}

// What was compressed meanwhile stays so. Rows that then hold part of what was given are broken, and so are all where
// compressing itself was cut short.
void Session::takeBack(Counters const& before)
{
    bool changed = false, changing = false;
    for (size_t i = 0; i < mBehaviours.size(); ++i)
    {
        changed = changed || mBehaviours[i]->changes != before.changes[i];
        changing = changing || mBehaviours[i]->changing;
    }
    if (!changed)
    {
        mSlots.position = before.position;
        mSlots.lengths = before.lengths;
        mSlots.chunks = before.chunks;
        for (size_t i = 0; i < mBehaviours.size(); ++i)
        {
            mBehaviours[i]->takeBack(before.behaviours[i]);
        }
        return;
    }
    for (size_t row = 0; row < mBroken.size(); ++row)
    {
        mBroken[row] |= changing || mSlots.position[row] != before.position[row];
    }
}

void Session::endTurn(int64_t row)
{
    Rows const rows = mask(row);
    undoneIfFailed([&] {
        for (auto const& behaviour : mBehaviours)
        {
            behaviour->endTurn(rows);
        }
    });
    for (size_t r = 0; r < rows.size(); ++r)
    {
        mOpen[r] = mOpen[r] && !rows[r];
    }
}

void Session::compress(int64_t row)
{
    Rows const rows = mask(row);
    undoneIfFailed([&] {
        for (auto const& behaviour : mBehaviours)
        {
            behaviour->compress(rows);
        }
    });
    for (size_t r = 0; finishesTurns() && r < rows.size(); ++r)
    {
        mOpen[r] = mOpen[r] && !rows[r];
    }
}

bool Session::keepsTurns() const
{
    return std::any_of(mContract.behaviours.begin(), mContract.behaviours.end(),
        [](BehaviourSpec const& spec) { return std::holds_alternative<NexusTurns>(spec); });
}

bool Session::finishesTurns() const
{
    return keepsTurns()
        || std::any_of(mContract.behaviours.begin(), mContract.behaviours.end(),
            [](BehaviourSpec const& spec) { return std::holds_alternative<IsolatedTurns>(spec); });
}

void Session::reset(int64_t row)
{
    Rows const rows = mask(row);
    mEngine->reset(row);
    mSlots.reset(rows);
    for (size_t r = 0; r < rows.size(); ++r)
    {
        if (rows[r])
        {
            mBroken[r] = 0;
            forgetTurn(r);
        }
    }
    for (auto const& behaviour : mBehaviours)
    {
        behaviour->reset(rows);
        behaviour->changing = false;
    }
}

CompressionStats Session::stats() const
{
    CompressionStats all;
    for (auto const& behaviour : mBehaviours)
    {
        if (behaviour->makesRoom())
        {
            all.runs = behaviour->stats.runs;
            all.evicted = behaviour->stats.evicted;
        }
        all.seconds += behaviour->stats.seconds;
    }
    return all;
}
} // namespace semkv::runtime

// What a session lets a caller do with turns: take one back, and pin what must stay. As semkv_deploy/runtime/turns.py.
#include "session/session.h"

#include "behaviours/nexus_turns.h"

#include <algorithm>

namespace semkv::runtime
{
// Opens a turn in these rows, where none is open: before anything is appended.
void Session::begin(Rows const& rows)
{
    Rows opened(rows.size());
    for (size_t row = 0; row < rows.size(); ++row)
    {
        opened[row] = rows[row] && !mOpen[row];
    }
    undoneIfFailed([&] {
        for (auto const& behaviour : mBehaviours)
        {
            behaviour->beginTurn(opened);
        }
    });
    for (size_t row = 0; row < rows.size(); ++row)
    {
        if (opened[row])
        {
            mStarts[row] = TurnStart{mSlots.position[row], lengthsOf(row), mSlots.chunks[row]};
        }
        mOpen[row] |= opened[row];
    }
}

Ids Session::lengthsOf(size_t row) const
{
    Ids lengths;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        lengths.push_back(mSlots.length(group, static_cast<int64_t>(row)));
    }
    return lengths;
}

// Rows have another conversation: a turn of it begins with what is appended next.
void Session::forgetTurn(size_t row)
{
    mOpen[row] = 0;
    mStarts[row].reset();
}

void Session::undoTurn(int64_t row)
{
    Rows const rows = mask(row);
    for (size_t r = 0; r < rows.size(); ++r)
    {
        if (!rows[r])
        {
            continue;
        }
        std::string const name = "row " + std::to_string(r);
        if (!mStarts[r])
        {
            throw Error(SEMKV_BAD_ARGUMENT, "there is no turn to take back").where(name).fix("append something first");
        }
        int64_t const appended = mSlots.position[r] - mStarts[r]->position;
        Ids const now = lengthsOf(r);
        for (size_t group = 0; group < now.size(); ++group)
        {
            if (now[group] - mStarts[r]->lengths[group] != appended)
            {
                throw Error(
                    SEMKV_BAD_ARGUMENT, "the turn cannot be taken back: something was compressed since it began")
                    .where(name)
                    .fix("save the session before a turn, and load it");
            }
        }
    }
    for (size_t r = 0; r < rows.size(); ++r)
    {
        if (!rows[r])
        {
            continue;
        }
        TurnStart const start = *mStarts[r];
        mSlots.position[r] = start.position;
        for (size_t group = 0; group < mSlots.groups; ++group)
        {
            mSlots.length(group, static_cast<int64_t>(r)) = start.lengths[group];
        }
        mSlots.chunks[r] = start.chunk;
        forgetTurn(r);
        for (auto const& behaviour : mBehaviours)
        {
            behaviour->takenBack(static_cast<int64_t>(r));
        }
    }
}

void Session::pin(int64_t row)
{
    Rows const rows = mask(row);
    Ids begun;
    for (size_t r = 0; r < rows.size(); ++r)
    {
        begun.push_back(mStarts[r] ? mStarts[r]->position : mSlots.position[r]);
    }
    for (auto const& behaviour : mBehaviours)
    {
        if (behaviour->pins())
        {
            behaviour->pin(rows, begun);
            return;
        }
    }
    throw Error(SEMKV_BAD_ARGUMENT, "the bundle's method pins nothing")
        .where("session")
        .expected("turns=isolated, method importance with queries=repeat, or sonic, and a budget below 1")
        .fix("build with --method importance");
}

TurnKeeper& Session::keeper() const
{
    for (auto const& behaviour : mBehaviours)
    {
        if (auto* const keeper = dynamic_cast<TurnKeeper*>(behaviour.get()))
        {
            return *keeper;
        }
    }
    throw Error(SEMKV_BAD_ARGUMENT, "the bundle's method makes nothing of turns")
        .where("session")
        .expected("method sonic, a budget below 1")
        .fix("build with --method sonic");
}

void Session::keepOfTurns(double share, int64_t tokens)
{
    keeper().keep(share, tokens);
}

void Session::trimTurns(int64_t tokens, int64_t row)
{
    TurnKeeper& keeper = this->keeper();
    Rows const rows = mask(row);
    if (tokens < 1)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "out of range")
            .where("trim_turns")
            .expected("1 or more")
            .got(std::to_string(tokens));
    }
    undoneIfFailed([&] { keeper.trim(tokens, rows); });
}
} // namespace semkv::runtime

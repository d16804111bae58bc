#include "behaviours/isolated_turns.h"

#include <algorithm>
#include <cmath>

namespace semkv::runtime
{
namespace
{
bool any(Rows const& rows)
{
    return std::find(rows.begin(), rows.end(), 1) != rows.end();
}
} // namespace

TurnIsolator::TurnIsolator(IsolatedTurns const& spec, Engine& engine, Slots& slots)
    : Behaviour(engine, slots)
    , mSpec(spec)
    , mFrozen(slots.groups, Ids(static_cast<size_t>(slots.batch), 0))
    , mPinned(mFrozen)
    , mBegun(static_cast<size_t>(slots.batch), 0)
    , mEnded(static_cast<size_t>(slots.batch), 0)
{
}

Rows TurnIsolator::finishes(Rows const& rows) const
{
    Rows over(rows.size());
    for (size_t row = 0; row < rows.size(); ++row)
    {
        over[row] = rows[row] && mEnded[row];
    }
    return over;
}

void TurnIsolator::beginTurn(Rows const& rows)
{
    Rows const over = finishes(rows);
    if (any(over))
    {
        finish(over);
    }
}

void TurnIsolator::beforeAppend(Ids const& count)
{
    std::vector<Rows> full(mSlots.groups, Rows(count.size(), 0));
    Table own(mFrozen);
    bool anyFull = false;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        for (size_t row = 0; row < count.size(); ++row)
        {
            int64_t const length = mSlots.length(group, static_cast<int64_t>(row));
            full[group][row] = length + count[row] > mContract.groups[group].capacity - mSpec.reserve;
            own[group][row] = length - mFrozen[group][row];
            anyFull = anyFull || full[group][row];
        }
    }
    if (anyFull)
    {
        fit(full, std::move(own), mSpec.recentLeast);
    }
}

void TurnIsolator::end(Rows const& rows)
{
    for (size_t row = 0; row < rows.size(); ++row)
    {
        mEnded[row] |= rows[row] && mSlots.position[row] > mBegun[row];
    }
}

void TurnIsolator::endTurn(Rows const& rows)
{
    end(rows);
    if (mSpec.atTurns)
    {
        beginTurn(rows);
    }
}

void TurnIsolator::compress(Rows const& rows)
{
    end(rows);
    beginTurn(rows);
}

// Fits these rows' turns to their share, once and for all.
void TurnIsolator::finish(Rows const& rows)
{
    Table own(mFrozen);
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        for (size_t row = 0; row < rows.size(); ++row)
        {
            double const tokens = static_cast<double>(mSlots.position[row] - mBegun[row]);
            int64_t const share = static_cast<int64_t>(std::ceil(mSpec.turnShare[group] * tokens));
            own[group][row] = std::max(share, mSpec.least - mFrozen[group][row]);
        }
    }
    fit(std::vector<Rows>(mSlots.groups, rows), std::move(own), 0);
    freeze(rows);
}

// What these rows hold is of finished turns from now on.
void TurnIsolator::freeze(Rows const& rows)
{
    for (size_t row = 0; row < rows.size(); ++row)
    {
        for (size_t group = 0; rows[row] && group < mSlots.groups; ++group)
        {
            mFrozen[group][row] = mSlots.length(group, static_cast<int64_t>(row));
        }
        mBegun[row] = rows[row] ? mSlots.position[row] : mBegun[row];
        mEnded[row] = mEnded[row] && !rows[row];
    }
}

int64_t TurnIsolator::sinks(size_t group) const
{
    return mSpec.byGroup.at("sinks")[group].as<int64_t>()[0];
}

void TurnIsolator::fit(std::vector<Rows> const& wanted, Table own, int64_t recentLeast)
{
    std::vector<Rows> now(wanted);
    Table first(own), target(own), recent(own);
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t const keep = mSpec.keepSlots[group];
        for (size_t row = 0; row < own[group].size(); ++row)
        {
            int64_t const frozen = mFrozen[group][row];
            int64_t const length = mSlots.length(group, static_cast<int64_t>(row));
            // Older turns give way down to half of what may stay, and the open one beyond that.
            int64_t const slots = std::min({own[group][row], length - frozen, std::max(keep - frozen, keep / 2)});
            int64_t const share = static_cast<int64_t>(mSpec.recentShare * static_cast<double>(slots));
            now[group][row] = wanted[group][row] && frozen + slots < length;
            first[group][row] = std::max(sinks(group), frozen);
            target[group][row] = frozen + slots;
            recent[group][row] = std::max(share, recentLeast);
        }
    }
    runAlike(now, first, target, recent);
    Table before(own);
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t const keep = mSpec.keepSlots[group];
        for (size_t row = 0; row < own[group].size(); ++row)
        {
            int64_t const length = mSlots.length(group, static_cast<int64_t>(row));
            now[group][row] = wanted[group][row] && length > keep;
            first[group][row] = std::max(sinks(group), mPinned[group][row]);
            target[group][row] = keep;
            recent[group][row] = length - mFrozen[group][row];
            before[group][row] = length;
        }
    }
    runAlike(now, first, target, recent);
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        for (size_t row = 0; row < own[group].size(); ++row)
        {
            mFrozen[group][row] -= before[group][row] - mSlots.length(group, static_cast<int64_t>(row));
        }
    }
}

void TurnIsolator::runAlike(std::vector<Rows> wanted, Table const& sinks, Table const& target, Table const& recent)
{
    size_t const batch = mEnded.size();
    while (true)
    {
        std::map<size_t, Feeds> feeds;
        for (size_t group = 0; group < mSlots.groups; ++group)
        {
            int64_t least = kMost + 1;
            for (size_t row = 0; row < batch; ++row)
            {
                least = wanted[group][row] ? std::min(least, sinks[group][row]) : least;
            }
            if (least > kMost)
            {
                continue;
            }
            Ids of(batch, mContract.groups[group].capacity), window(batch, 0);
            for (size_t row = 0; row < batch; ++row)
            {
                if (wanted[group][row] && sinks[group][row] == least)
                {
                    of[row] = target[group][row];
                    window[row] = recent[group][row];
                    wanted[group][row] = 0;
                }
            }
            Feeds& given = feeds[group];
            for (auto const& [name, values] : mSpec.byGroup)
            {
                given[name] = values[group];
            }
            given["sinks"] = Array::of({}, {least});
            given["target"] = Array::of({mSlots.batch}, of);
            given["recent"] = Array::of({mSlots.batch}, window);
        }
        if (feeds.empty())
        {
            return;
        }
        runGroups(mSpec.program, std::move(feeds));
    }
}

void TurnIsolator::takenBack(int64_t row)
{
    size_t const r = static_cast<size_t>(row);
    clearDead("slot_attention", row);
    // What was pinned, or finished whole, since the turn began is gone with it.
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        mFrozen[group][r] = std::min(mFrozen[group][r], mSlots.length(group, row));
        mPinned[group][r] = std::min(mPinned[group][r], mSlots.length(group, row));
    }
    mEnded[r] = 0;
    mBegun[r] = std::min(mBegun[r], mSlots.position[r]);
}

void TurnIsolator::reset(Rows const& rows)
{
    Behaviour::reset(rows);
    for (size_t row = 0; row < rows.size(); ++row)
    {
        for (size_t group = 0; rows[row] && group < mSlots.groups; ++group)
        {
            mFrozen[group][row] = mPinned[group][row] = 0;
        }
        mBegun[row] = rows[row] ? 0 : mBegun[row];
        mEnded[row] = mEnded[row] && !rows[row];
    }
}

Feeds TurnIsolator::state(int64_t first, int64_t last) const
{
    Ids frozen, pinned, begun, ended;
    for (size_t row = static_cast<size_t>(first); row < static_cast<size_t>(last); ++row)
    {
        for (size_t group = 0; group < mSlots.groups; ++group)
        {
            frozen.push_back(mFrozen[group][row]);
            pinned.push_back(mPinned[group][row]);
        }
        begun.push_back(mBegun[row]);
        ended.push_back(mEnded[row]);
    }
    int64_t const count = last - first, groups = static_cast<int64_t>(mSlots.groups);
    return {{"frozen", Array::of({count, groups}, frozen)}, {"pinned", Array::of({count, groups}, pinned)},
        {"begun", Array::of({count}, begun)}, {"ended", Array::of({count}, ended)}};
}

void TurnIsolator::restore(Feeds const& state, int64_t first)
{
    int64_t const* const frozen = state.at("frozen").as<int64_t>();
    int64_t const* const pinned = state.at("pinned").as<int64_t>();
    for (size_t i = 0; i < static_cast<size_t>(state.at("begun").shape[0]); ++i)
    {
        size_t const row = static_cast<size_t>(first) + i;
        // A file that says otherwise was not saved by a session.
        for (size_t group = 0; group < mSlots.groups; ++group)
        {
            size_t const at = i * mSlots.groups + group;
            int64_t const length = mSlots.length(group, static_cast<int64_t>(row));
            mFrozen[group][row] = std::clamp<int64_t>(frozen[at], 0, length);
            mPinned[group][row]
                = std::clamp<int64_t>(pinned[at], 0, std::min(mFrozen[group][row], mostPinned(group)));
        }
        mBegun[row] = std::clamp<int64_t>(state.at("begun").as<int64_t>()[i], 0, mSlots.position[row]);
        mEnded[row] = state.at("ended").as<int64_t>()[i] != 0 && mSlots.position[row] > mBegun[row];
    }
}
} // namespace semkv::runtime

#include "behaviours/make_room.h"

#include <algorithm>
#include <cmath>

namespace semkv::runtime
{
namespace
{
constexpr float kPinned = 2.0f; // the slot_attention of a slot that must stay: weights of attention are 1 at most
char const* const kAttention = "slot_attention";
} // namespace

RoomMaker::RoomMaker(MakeRoom const& spec, Engine& engine, Slots& slots)
    : Behaviour(engine, slots)
    , mSpec(spec)
    , mPins(mContract.buffer(kAttention) != nullptr && spec.byGroup.count("sinks") > 0)
{
    // Scores of blocks are means: they tell no slot from its neighbours.
    for (BehaviourSpec const& each : mContract.behaviours)
    {
        auto const* blocks = std::get_if<BlockRule>(&each);
        mPins = mPins && (blocks == nullptr || !blocks->program.empty());
    }
}

void RoomMaker::beforeAppend(Ids const& count)
{
    std::map<size_t, Ids> targets;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t const capacity = mContract.groups[group].capacity;
        Ids target(count.size(), capacity);
        bool any = false;
        for (size_t row = 0; row < count.size(); ++row)
        {
            if (mSlots.length(group, static_cast<int64_t>(row)) + count[row] > capacity - mSpec.reserve)
            {
                target[row] = mSpec.keepSlots[group];
                any = true;
            }
        }
        if (any)
        {
            targets[group] = target;
        }
    }
    if (!targets.empty())
    {
        run(targets);
    }
}

void RoomMaker::endTurn(Rows const& rows)
{
    if (mSpec.atTurns)
    {
        compress(rows);
    }
}

void RoomMaker::compress(Rows const& rows)
{
    std::map<size_t, Ids> targets;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t const keep = mSpec.keepSlots[group];
        Ids target(rows.size(), mContract.groups[group].capacity);
        Ids const pinned = leastWithPinned(group);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            if (rows[row])
            {
                double const share = mSpec.turnShare[group] * static_cast<double>(mSlots.position[row]);
                int64_t const wanted = static_cast<int64_t>(std::ceil(share));
                target[row] = std::max(std::clamp(wanted, std::min(mSpec.least, keep), keep), pinned[row]);
            }
        }
        targets[group] = target;
    }
    run(targets);
}

Ids RoomMaker::leastWithPinned(size_t group) const
{
    Ids least(static_cast<size_t>(mSlots.batch), 0);
    if (!mPins)
    {
        return least;
    }
    Array const attention = mEngine.read(kAttention, group);
    int64_t const sinks = mSpec.byGroup.at("sinks")[group].as<int64_t>()[0];
    int64_t const heads = attention.shape[1], capacity = attention.shape[2], keep = mSpec.keepSlots[group];
    for (int64_t row = 0; row < mSlots.batch; ++row)
    {
        int64_t most = 0;
        bool any = false;
        for (int64_t head = 0; head < heads; ++head)
        {
            float const* const of = attention.as<float>() + (row * heads + head) * capacity;
            int64_t staying = 0;
            for (int64_t slot = 0; slot < mSlots.length(group, row); ++slot)
            {
                any = any || of[slot] >= kPinned;
                staying += of[slot] >= kPinned || slot < sinks;
            }
            most = std::max(most, staying);
        }
        double const needed = std::ceil(static_cast<double>(most) / (1 - mSpec.recentShare));
        if (any)
        {
            // With a window of everything no number is enough.
            bool const finite = needed < static_cast<double>(keep);
            least[static_cast<size_t>(row)]
                = std::min(finite ? static_cast<int64_t>(needed) + mSpec.recentLeast : keep, keep);
        }
    }
    return least;
}

void RoomMaker::run(std::map<size_t, Ids> const& targets)
{
    std::map<size_t, Feeds> feeds;
    for (auto const& [group, target] : targets)
    {
        Feeds& given = feeds[group];
        for (auto const& [name, values] : mSpec.byGroup)
        {
            given[name] = values[group];
        }
        Ids recent;
        for (int64_t const slots : target)
        {
            int64_t const share = static_cast<int64_t>(mSpec.recentShare * static_cast<double>(slots));
            recent.push_back(std::max(share, mSpec.recentLeast));
        }
        given["target"] = Array::of({mSlots.batch}, target);
        given["recent"] = Array::of({mSlots.batch}, recent);
    }
    runGroups(mSpec.program, std::move(feeds));
}
} // namespace semkv::runtime

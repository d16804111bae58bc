// Which slots go, when turns are finished and when there is no room (nexus_room_rule, drop_rule).
#include "behaviours/nexus_turns.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

namespace semkv::runtime
{
namespace
{
constexpr int64_t kPinned = -1;

int64_t count(std::vector<uint8_t> const& stays)
{
    return std::accumulate(stays.begin(), stays.end(), int64_t{0});
}
} // namespace

void TurnKeeper::trim(int64_t most, Rows const& rows)
{
    std::vector<Kept> keep;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        Kept stays = live(group);
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t const* const turn = mSlots.column("slot_turn")[group].slots(static_cast<int64_t>(row), 0);
            std::map<int64_t, int64_t> seen; // Nexus rows so far, by turn
            for (size_t slot = 0; rows[row] && slot < stays[row].size(); ++slot)
            {
                bool const nexus = stays[row][slot] && turn[slot] > 0 && turn[slot] % 2 == 1;
                stays[row][slot] = stays[row][slot] && (!nexus || ++seen[turn[slot]] <= most);
            }
        }
        keep.push_back(std::move(stays));
    }
    drop(keep);
}

// Drops finished turns, the oldest first, and then the oldest slots of the open one.
void TurnKeeper::makeRoom(Ids const& appended)
{
    std::vector<Kept> keep;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t const capacity = mContract.groups[group].capacity;
        Kept stays = live(group);
        for (size_t row = 0; row < appended.size(); ++row)
        {
            if (mSlots.length(group, static_cast<int64_t>(row)) + appended[row] > capacity)
            {
                cut(stays[row], group, static_cast<int64_t>(row), capacity - appended[row]);
            }
        }
        keep.push_back(std::move(stays));
    }
    drop(keep);
}

// Clears slots of one row until `most` are left.
void TurnKeeper::cut(std::vector<uint8_t>& stays, size_t group, int64_t row, int64_t most)
{
    int64_t const* const turn = mSlots.column("slot_turn")[group].slots(row, 0);
    int64_t const* const position = mSlots.column("slot_position")[group].slots(row, 0);
    auto const free = [&](size_t slot) { return turn[slot] != kPinned && position[slot] >= mSpec.sinks; };
    std::set<int64_t> finished;
    for (size_t slot = 0; slot < stays.size(); ++slot)
    {
        if (stays[slot] && free(slot) && turn[slot] < 2 * mSlots.turn[static_cast<size_t>(row)])
        {
            finished.insert(turn[slot] / 2);
        }
    }
    for (int64_t const of : finished)
    {
        if (count(stays) <= most)
        {
            return;
        }
        for (size_t slot = 0; slot < stays.size(); ++slot)
        {
            stays[slot] = stays[slot] && !(free(slot) && turn[slot] / 2 == of);
        }
    }
    if (count(stays) <= most)
    {
        return;
    }
    int64_t excess = count(stays) - std::min(most, mSpec.keepSlots[group]);
    for (size_t slot = 0; slot < stays.size() && excess > 0; ++slot)
    {
        if (stays[slot] && free(slot))
        {
            stays[slot] = 0;
            --excess;
        }
    }
    if (count(stays) > most)
    {
        throw Error(SEMKV_CACHE_FULL, "what is pinned leaves no room for the next append")
            .where("row " + std::to_string(row) + ", cache group " + std::to_string(group))
            .expected("at most " + std::to_string(most) + " slots")
            .got(std::to_string(count(stays)))
            .fix("pin less, or build with a larger --budget or --max-context");
    }
}

TurnKeeper::Kept TurnKeeper::live(size_t group) const
{
    Kept stays(static_cast<size_t>(mSlots.batch));
    for (size_t row = 0; row < stays.size(); ++row)
    {
        stays[row].assign(static_cast<size_t>(mContract.groups[group].capacity), 0);
        std::fill_n(stays[row].begin(), mSlots.length(group, static_cast<int64_t>(row)), uint8_t{1});
    }
    return stays;
}

// Runs the program for every group that has a slot to drop.
void TurnKeeper::drop(std::vector<Kept> const& keep)
{
    std::map<size_t, Feeds> feeds;
    for (size_t group = 0; group < keep.size(); ++group)
    {
        bool dropped = false;
        int64_t const capacity = mContract.groups[group].capacity;
        Array index(Type::kInt64, {mSlots.batch, 1, capacity});
        std::fill_n(index.as<int64_t>(), elements(index.shape), -1);
        for (size_t row = 0; row < keep[group].size(); ++row)
        {
            int64_t* next = index.as<int64_t>() + static_cast<int64_t>(row) * capacity;
            for (size_t slot = 0; slot < keep[group][row].size(); ++slot)
            {
                if (keep[group][row][slot])
                {
                    *next++ = static_cast<int64_t>(slot);
                }
            }
            dropped = dropped || count(keep[group][row]) < mSlots.length(group, static_cast<int64_t>(row));
        }
        if (dropped)
        {
            feeds[group]["keep_index"] = std::move(index);
        }
    }
    if (!feeds.empty())
    {
        runGroups(mSpec.program, std::move(feeds));
    }
}
} // namespace semkv::runtime

// What a caller pins, and what is left of a turn that is taken back.
#include "behaviours/isolated_turns.h"
#include "behaviours/make_room.h"
#include "behaviours/nexus_turns.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
// In place of a slot's attention, of which 1 is the most; and of the number of its turn.
constexpr float kPinnedAttention = 2.0f;
constexpr int64_t kPinnedTurn = -1;
char const* const kAttention = "slot_attention";

[[noreturn]] void tooSmall(Contract const& contract, size_t group, int64_t most, int64_t got)
{
    throw Error(SEMKV_BAD_ARGUMENT, "the capacity is too small for what is pinned")
        .where("budget " + shortest(contract.budget) + ", cache group " + std::to_string(group))
        .expected("at most " + std::to_string(most) + " pinned slots of "
            + std::to_string(contract.groups[group].capacity))
        .got(std::to_string(got))
        .fix("pin less, or build with a larger --budget or --max-context");
}

// The most of these rows.
int64_t mostOf(Rows const& rows, Ids const& values)
{
    int64_t most = 0;
    for (size_t row = 0; row < rows.size(); ++row)
    {
        most = rows[row] ? std::max(most, values[row]) : most;
    }
    return most;
}
} // namespace

void RoomMaker::pin(Rows const& rows, Ids const& begun)
{
    Ids count;
    for (size_t row = 0; row < rows.size(); ++row)
    {
        count.push_back(mSlots.position[row] - begun[row]);
    }
    std::map<size_t, Array> marked;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t const keep = mSpec.keepSlots[group], sinks = mSpec.byGroup.at("sinks")[group].as<int64_t>()[0];
        Column const& position = mSlots.column("slot_position")[group];
        Array attention = mEngine.read(kAttention, group);
        int64_t const heads = attention.shape[1], capacity = attention.shape[2];
        int64_t after = 0; // slots that stay whatever comes, a window aside: what is pinned, and the sinks
        bool gone = false;
        for (int64_t row = 0; row < mSlots.batch; ++row)
        {
            bool const meant = rows[static_cast<size_t>(row)] != 0;
            for (int64_t head = 0; head < heads; ++head)
            {
                float* const of = attention.as<float>() + (row * heads + head) * capacity;
                int64_t const* const at = position.slots(row, position.heads == 1 ? 0 : head);
                int64_t staying = 0, since = 0;
                for (int64_t slot = 0; slot < mSlots.length(group, row); ++slot)
                {
                    bool const own = at[slot] >= begun[static_cast<size_t>(row)];
                    since += own;
                    of[slot] = meant && own ? kPinnedAttention : of[slot];
                    staying += of[slot] >= kPinnedAttention || slot < sinks;
                }
                after = std::max(after, staying);
                gone = gone || (meant && since < count[static_cast<size_t>(row)]);
            }
        }
        // A window of what is newest stays as well. In a layer with a sliding window only the oldest go.
        auto const scored = mSpec.byGroup.find("scored");
        bool const counts = scored == mSpec.byGroup.end() || numberOf(scored->second[group]) != 0;
        int64_t const window
            = std::max(static_cast<int64_t>(mSpec.recentShare * static_cast<double>(keep)), mSpec.recentLeast);
        if (counts && (gone || after > keep - window))
        {
            tooSmall(mContract, group, keep - window, std::max(after, mostOf(rows, count)));
        }
        marked[group] = std::move(attention);
    }
    for (auto const& [group, attention] : marked)
    {
        mEngine.write(kAttention, group, attention);
    }
}

double RoomMaker::numberOf(Array const& value)
{
    return value.type == Type::kInt64 ? static_cast<double>(value.as<int64_t>()[0])
                                      : static_cast<double>(value.as<float>()[0]);
}

void RoomMaker::takenBack(int64_t row)
{
    if (mPins)
    {
        clearDead(kAttention, row);
    }
}

// Slots stay for their place: whatever the row holds is frozen, and older turns give way behind it.
void TurnIsolator::pin(Rows const& rows, Ids const&)
{
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        int64_t after = 0;
        bool gone = false; // a part that is gone already cannot be kept
        Ids tokens;
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t const length = mSlots.length(group, static_cast<int64_t>(row));
            tokens.push_back(mSlots.position[row] - mBegun[row]);
            after = std::max(after, rows[row] ? length : mPinned[group][row]);
            gone = gone || (rows[row] && length - mFrozen[group][row] < tokens[row]);
        }
        if (gone || after > mostPinned(group))
        {
            tooSmall(mContract, group, mostPinned(group), std::max(after, mostOf(rows, tokens)));
        }
    }
    for (size_t row = 0; row < rows.size(); ++row)
    {
        for (size_t group = 0; rows[row] && group < mSlots.groups; ++group)
        {
            mPinned[group][row] = mSlots.length(group, static_cast<int64_t>(row));
        }
    }
    freeze(rows);
}

void TurnKeeper::pin(Rows const& rows, Ids const&)
{
    std::vector<Kept> pinned;
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        Kept of = live(group);
        Column const& turns = mSlots.column("slot_turn")[group];
        Column const& positions = mSlots.column("slot_position")[group];
        int64_t most = 0;
        bool gone = false; // a part that is gone already cannot be kept
        Ids seen;
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t const* const turn = turns.slots(static_cast<int64_t>(row), 0);
            int64_t const* const position = positions.slots(static_cast<int64_t>(row), 0);
            int64_t own = 0, staying = 0;
            for (size_t slot = 0; slot < of[row].size(); ++slot)
            {
                bool const isOwn = of[row][slot] && turn[slot] == 2 * mSlots.turn[row];
                own += isOwn;
                of[row][slot] = of[row][slot]
                    && ((rows[row] && isOwn) || turn[slot] == kPinnedTurn || position[slot] < mSpec.sinks);
                staying += of[row][slot];
            }
            seen.push_back(mSlots.position[row] - mBegun[row]);
            most = std::max(most, staying);
            gone = gone || (rows[row] && own < seen[row]);
        }
        if (most > mSpec.keepSlots[group] || gone)
        {
            tooSmall(mContract, group, mSpec.keepSlots[group], std::max(most, mostOf(rows, seen)));
        }
        pinned.push_back(std::move(of));
    }
    for (size_t group = 0; group < mSlots.groups; ++group)
    {
        for (size_t row = 0; row < rows.size(); ++row)
        {
            int64_t* const turn = mSlots.column("slot_turn")[group].slots(static_cast<int64_t>(row), 0);
            for (size_t slot = 0; slot < pinned[group][row].size(); ++slot)
            {
                turn[slot] = pinned[group][row][slot] ? kPinnedTurn : turn[slot];
            }
        }
    }
    for (size_t row = 0; row < rows.size(); ++row)
    {
        mBegun[row] = rows[row] ? mSlots.position[row] : mBegun[row];
    }
}

void TurnKeeper::takenBack(int64_t row)
{
    size_t const r = static_cast<size_t>(row);
    mEnded[r] = 0;
    mBegun[r] = std::min(mBegun[r], mSlots.position[r]);
}
} // namespace semkv::runtime

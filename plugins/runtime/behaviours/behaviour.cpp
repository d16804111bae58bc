#include "behaviours/behaviour.h"

#include "behaviours/blocks.h"
#include "behaviours/isolated_turns.h"
#include "behaviours/make_room.h"
#include "behaviours/nexus_turns.h"
#include "behaviours/read_again.h"
#include "behaviours/slot_tables.h"

#include <algorithm>
#include <chrono>

namespace semkv::runtime
{
namespace
{
double now()
{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// An output of a group's program, of a type and size that the host can take.
Array const& taken(Feeds const& outputs, std::string const& name, size_t count)
{
    auto const found = outputs.find(name);
    if (found == outputs.end() || found->second.type != Type::kInt64 || found->second.data.size() != 8 * count)
    {
        throw Error(SEMKV_BAD_BUNDLE, "a group's program does not give what the contract says")
            .where("output " + name)
            .expected("int64, " + std::to_string(count) + " numbers")
            .fix("build the bundle again");
    }
    return found->second;
}
} // namespace

Timed::Timed(double& sum)
    : mSum(sum)
    , mStart(now())
{
}

Timed::~Timed()
{
    mSum += now() - mStart;
}

void Behaviour::reset(Rows const& rows)
{
    if (std::all_of(rows.begin(), rows.end(), [](uint8_t row) { return row != 0; }))
    {
        stats = {};
    }
}

void Behaviour::runGroups(std::string const& program, std::map<size_t, Feeds> feeds)
{
    Timed const timed(stats.seconds);
    ++changes;
    changing = true;
    size_t const batch = static_cast<size_t>(mSlots.batch);
    for (auto& [group, given] : feeds)
    {
        for (size_t c = 0; c < mSlots.names.size(); ++c)
        {
            Column const& column = mSlots.columns[c][group];
            given[mSlots.names[c]] = Array::of({mSlots.batch, column.heads, column.capacity}, column.values);
        }
        Array& length = given["length"] = Array(Type::kInt64, {mSlots.batch});
        std::copy_n(&mSlots.lengths[group * batch], batch, length.as<int64_t>());
    }
    for (auto const& [group, outputs] : mEngine.runGroups(program, feeds))
    {
        int64_t const* const length = taken(outputs, "length_out", batch).as<int64_t>();
        int64_t const capacity = mContract.groups[group].capacity;
        // What an engine says is where the next tokens are written.
        if (std::any_of(length, length + batch, [&](int64_t each) { return each < 0 || each > capacity; }))
        {
            throw Error(SEMKV_BAD_BUNDLE, "a group's program gives a length that its capacity does not have")
                .where("cache group " + std::to_string(group))
                .expected("0 to " + std::to_string(capacity))
                .got(listed(std::vector<int64_t>(length, length + batch)));
        }
        std::copy_n(length, batch, &mSlots.lengths[group * batch]);
        for (size_t c = 0; c < mSlots.names.size(); ++c)
        {
            std::vector<int64_t>& values = mSlots.columns[c][group].values;
            std::copy_n(
                taken(outputs, mSlots.names[c] + "_out", values.size()).as<int64_t>(), values.size(), values.data());
        }
        auto const evicted = outputs.find("evicted");
        if (evicted != outputs.end() && evicted->second.type == Type::kInt64)
        {
            int64_t const* const each = evicted->second.as<int64_t>();
            for (size_t i = 0; i < evicted->second.data.size() / 8; ++i)
            {
                stats.evicted += each[i];
            }
        }
    }
    changing = false;
    ++stats.runs;
}

void Behaviour::clearDead(char const* buffer, int64_t row)
{
    for (size_t group = 0; mContract.buffer(buffer) != nullptr && group < mSlots.groups; ++group)
    {
        Array said = mEngine.read(buffer, group);
        int64_t const heads = said.shape[1], capacity = said.shape[2];
        for (int64_t head = 0; head < heads; ++head)
        {
            float* const of = said.as<float>() + (row * heads + head) * capacity;
            std::fill(of + mSlots.length(group, row), of + capacity, 0.0f);
        }
        mEngine.write(buffer, group, said);
    }
}

std::unique_ptr<Behaviour> interpreter(BehaviourSpec const& spec, Engine& engine, Slots& slots)
{
    if (auto const* room = std::get_if<MakeRoom>(&spec))
    {
        return std::make_unique<RoomMaker>(*room, engine, slots);
    }
    if (auto const* isolated = std::get_if<IsolatedTurns>(&spec))
    {
        return std::make_unique<TurnIsolator>(*isolated, engine, slots);
    }
    if (auto const* read = std::get_if<ReadAgain>(&spec))
    {
        return std::make_unique<Rereader>(*read, engine, slots);
    }
    if (auto const* turns = std::get_if<NexusTurns>(&spec))
    {
        return std::make_unique<TurnKeeper>(*turns, engine, slots);
    }
    if (auto const* tables = std::get_if<SlotTables>(&spec))
    {
        return std::make_unique<SlotTabulator>(*tables, engine, slots);
    }
    auto const& rule = std::get<BlockRule>(spec);
    if (rule.program.empty())
    {
        return std::make_unique<BlockKeeper>(rule, engine, slots);
    }
    return std::make_unique<BlockTabulator>(rule, engine, slots);
}
} // namespace semkv::runtime

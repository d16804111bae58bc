// Reads what a host does between runs, and compares it with the contract that it is of.
#include "bundle/contract.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
// Buffers, columns and counters that a host gives a group's program by itself; what else it takes must be fixed by
// group.
void checkInputs(Field const& field, Contract const& contract, std::string const& program,
    std::vector<std::string> const& counted, std::map<std::string, std::vector<Array>> const& fixed)
{
    Program const& run = contract.programs.at(program);
    for (Graph const& graph : run.graphs)
    {
        for (int64_t const number : graph.groups)
        {
            size_t const group = static_cast<size_t>(number);
            for (TensorSpec const& tensor : graph.inputs)
            {
                bool known = std::find(counted.begin(), counted.end(), tensor.name) != counted.end();
                for (Buffer const& column : contract.columns)
                {
                    known = known || column.name == tensor.name;
                }
                for (auto const& [name, binding] : run.buffers)
                {
                    known = known
                        || (binding.input
                            && Binding::named(*binding.input, group, contract.groups.size()) == tensor.name);
                }
                auto const found = fixed.find(tensor.name);
                known = known || (found != fixed.end() && found->second[group].type == tensor.type);
                if (!known)
                {
                    field.contradicts("inputs of program " + program + " that a host has", tensor.name);
                }
            }
        }
    }
}

std::string programOf(Field const& field, Contract const& contract, char const* name, bool ofGroup)
{
    std::string const program = field.at(name).text();
    auto const found = contract.programs.find(program);
    if (found == contract.programs.end() || found->second.ofGroup != ofGroup)
    {
        field.at(name).contradicts(ofGroup ? "a program of scope group" : "a program of scope cache", program);
    }
    return program;
}

std::vector<int64_t> slotsByGroup(Field const& field, Contract const& contract)
{
    std::vector<int64_t> slots = field.integers(1, kMost);
    if (slots.size() != contract.groups.size())
    {
        field.contradicts(
            std::to_string(contract.groups.size()) + " values, one a group", std::to_string(slots.size()));
    }
    for (size_t group = 0; group < slots.size(); ++group)
    {
        if (slots[group] > contract.groups[group].capacity)
        {
            field.contradicts("at most each group's capacity", listed(slots));
        }
    }
    return slots;
}

// A number is a scalar, of int64 where it is whole; a list is float32 of one dimension.
Array fixedInput(Field const& field)
{
    if (field.isInteger())
    {
        return Array::of({}, {field.integer(-kMost, kMost)});
    }
    std::vector<double> const values
        = field.isList() ? field.numbers(-kMost, kMost) : std::vector<double>{field.number(-kMost, kMost)};
    Shape const shape = field.isList() ? Shape{static_cast<int64_t>(values.size())} : Shape{};
    Array array(Type::kFloat32, shape);
    std::transform(
        values.begin(), values.end(), array.as<float>(), [](double value) { return static_cast<float>(value); });
    return array;
}

MakeRoom readMakeRoom(Field const& field, Contract const& contract, char const* otherwise)
{
    field.only({"kind", "program", "when", "keep_slots", "turn_share", "least", "recent_share", "recent_least",
        "reserve", "by_group"});
    MakeRoom room;
    room.program = programOf(field, contract, "program", true);
    room.atTurns = field.at("when").text({otherwise, "turn"}) == "turn";
    room.keepSlots = slotsByGroup(field.at("keep_slots"), contract);
    room.turnShare = field.at("turn_share").numbers(0, kMost);
    room.least = field.at("least").integer(1, kMost);
    room.recentShare = field.at("recent_share").number(0, 1);
    room.recentLeast = field.at("recent_least").integer(0, kMost);
    room.reserve = field.at("reserve").integer(0, kMost);
    Field const fixed = field.at("by_group");
    size_t const groups = contract.groups.size();
    for (std::string const& name : fixed.names())
    {
        Field const values = fixed.at(name);
        if (values.size() != groups)
        {
            values.contradicts(std::to_string(groups) + " values, one a group", std::to_string(values.size()));
        }
        for (size_t group = 0; group < groups; ++group)
        {
            room.byGroup[name].push_back(fixedInput(values.at(group)));
        }
    }
    if (room.turnShare.size() != groups)
    {
        field.at("turn_share").contradicts("one a group", std::to_string(room.turnShare.size()));
    }
    for (size_t group = 0; group < groups; ++group)
    {
        // Else a piece of a prompt would find no room after a compression either.
        if (room.keepSlots[group] + contract.prefillChunk + room.reserve > contract.groups[group].capacity)
        {
            field.at("keep_slots").contradicts("room beside for a prompt's piece", listed(room.keepSlots));
        }
    }
    checkInputs(field, contract, room.program, {"length", "target", "recent"}, room.byGroup);
    return room;
}

IsolatedTurns readIsolatedTurns(Field const& field, Contract const& contract)
{
    IsolatedTurns turns{readMakeRoom(field, contract, "begin")};
    auto const sinks = turns.byGroup.find("sinks");
    // Without them a program would choose from older turns as from the open one; and half is what these may have.
    bool whole = sinks != turns.byGroup.end();
    for (size_t group = 0; whole && group < contract.groups.size(); ++group)
    {
        Array const& value = sinks->second[group];
        int64_t const keep = turns.keepSlots[group];
        whole = value.type == Type::kInt64 && value.shape.empty() && value.as<int64_t>()[0] >= 0
            && value.as<int64_t>()[0] <= keep - keep / 2;
    }
    if (!whole)
    {
        field.at("by_group").contradicts("for each group sinks, at most half of keep_slots", "others");
    }
    for (Graph const& graph : contract.programs.at(turns.program).graphs)
    {
        if (graph.input("sinks") == nullptr)
        {
            field.at("program").contradicts("an input sinks of graph " + graph.name, "none of that name");
        }
    }
    return turns;
}

ReadAgain readReadAgain(Field const& field, Contract const& contract)
{
    field.only({"kind", "program", "input", "when", "piece"});
    ReadAgain read{programOf(field, contract, "program", false), field.at("input").text(),
        field.at("when").text({"full", "turn"}) == "turn", field.at("piece").integer(1, contract.prefillChunk)};
    StepInput const* input = contract.stepInput(read.input);
    if (input == nullptr || input->byRow || input->count != 2)
    {
        field.at("input").contradicts("one of cache.step_inputs, int64 [2]", read.input);
    }
    return read;
}

NexusTurns readNexusTurns(Field const& field, Contract const& contract)
{
    field.only({"kind", "program", "decoder", "when", "first_id", "most", "turns", "kept", "tokens", "nexus_share",
        "sinks", "keep_slots", "placement", "common"});
    NexusTurns turns;
    turns.program = programOf(field, contract, "program", true);
    turns.decoder = programOf(field, contract, "decoder", false);
    turns.atOnce = field.at("when").text({"begin", "turn"}) == "turn";
    turns.spread = field.has("placement") && field.at("placement").text({"appended", "spread"}) == "spread";
    for (int64_t const token : field.has("common") ? field.at("common").integers(0, contract.vocabSize - 1) : Ids())
    {
        if (!turns.common.emplace(token, turns.common.size()).second)
        {
            field.at("common").contradicts("ids, each once", std::to_string(token) + " twice");
        }
    }
    turns.firstId = field.at("first_id").integer(contract.vocabSize, contract.vocabSize);
    turns.most = field.at("most").integer(1, kMost);
    turns.turns = field.at("turns").integer(1, kMost / turns.most);
    turns.kept = field.at("kept").number(0, 1);
    turns.tokens = field.at("tokens").integer(0, kMost);
    turns.nexusShare = field.at("nexus_share").number(0, 1);
    turns.sinks = field.at("sinks").integer(0, kMost);
    turns.keepSlots = slotsByGroup(field.at("keep_slots"), contract);
    for (std::string const name : {"slot_turn", "slot_token"})
    {
        bool const counted = std::any_of(contract.columns.begin(), contract.columns.end(),
            [&](Buffer const& column) { return column.name == name && column.dims[1] == "1"; });
        if (!counted && (turns.spread || name == "slot_turn"))
        {
            field.contradicts("a slot column " + name + " B,1,C", "none");
        }
    }
    checkInputs(field, contract, turns.program, {"length", "keep_index"}, {});
    return turns;
}

BlockRule readBlocks(Field const& field, Contract const& contract, bool tables)
{
    field.only({"kind", "base", "search", "nearness", "turn_ids", "token_ids", "domains", "domain", "column", "program",
        "input", "most", "closed"});
    BlockRule rule;
    rule.base = field.at("base").integer(1, 4096);
    rule.search = field.at("search").integer(0, rule.base / 4);
    rule.nearness = field.at("nearness").integer(0, kMost);
    rule.turnIds = field.at("turn_ids").integers(0, contract.vocabSize - 1);
    rule.tokenIds = field.at("token_ids").integers(0, contract.vocabSize - 1);
    Field const domains = field.at("domains");
    for (size_t i = 0; i < domains.size(); ++i)
    {
        Field const domain = domains.at(i);
        rule.domains.push_back(
            {domain.at("weights").integers(-kMost, kMost), domain.at("log_shares").integers(-kMost, kMost)});
        size_t const numbers = rule.tokenIds.size() + 1;
        if (rule.domains.back().weights.size() != numbers || rule.domains.back().logShares.size() != numbers)
        {
            domain.contradicts(std::to_string(numbers) + " weights and log shares", "others");
        }
    }
    if (field.has("domain"))
    {
        rule.domain
            = field.at("domain").integer(0, std::max<int64_t>(static_cast<int64_t>(rule.domains.size()) - 1, 0));
    }
    if (!tables)
    {
        rule.column = field.at("column").text();
        bool const there = std::any_of(contract.columns.begin(), contract.columns.end(),
            [&](Buffer const& column) { return column.name == rule.column; });
        if (!there)
        {
            field.at("column").contradicts("one of cache.slot_columns", rule.column);
        }
        return rule;
    }
    rule.program = programOf(field, contract, "program", true);
    rule.input = field.at("input").text();
    rule.most = field.at("most").integer(contract.capacity() / rule.shortest() + 2, 1 << 20);
    rule.closed = field.at("closed").integer((contract.prefillChunk - 1) / rule.shortest() + 2, 1 << 20);
    StepInput const* input = contract.stepInput(rule.input);
    if (input == nullptr || !input->byRow || input->count != rule.most)
    {
        field.at("input").contradicts("one of cache.step_inputs, B," + std::to_string(rule.most), rule.input);
    }
    checkInputs(field, contract, rule.program, {"block_start", "block_length", "block_number"}, {});
    return rule;
}
SlotTables readSlotTables(Field const& field, Contract const& contract)
{
    field.only({"kind", "program", "input", "column", "join", "most", "closed"});
    SlotTables tables;
    tables.program = programOf(field, contract, "program", true);
    tables.input = field.at("input").text();
    tables.column = field.at("column").text();
    tables.join = field.at("join").integer(1, 4096);
    tables.most = field.at("most").integer(2 * (contract.capacity() / (tables.join + 1)) + 3, 1 << 20);
    tables.closed = field.at("closed").integer(1, 1 << 20);
    int64_t heads = 0;
    for (CacheGroup const& group : contract.groups)
    {
        heads += group.heads;
    }
    StepInput const* input = contract.stepInput(tables.input);
    if (input == nullptr || !input->byRow || input->heads != heads || input->count != tables.most)
    {
        field.at("input").contradicts(
            "one of cache.step_inputs, B," + std::to_string(heads) + "," + std::to_string(tables.most), tables.input);
    }
    bool const numbered = std::any_of(contract.behaviours.begin(), contract.behaviours.end(),
        [&](BehaviourSpec const& spec) {
            auto const* blocks = std::get_if<BlockRule>(&spec);
            return blocks != nullptr && !tables.column.empty() && blocks->column == tables.column;
        });
    bool const byHead = std::any_of(contract.columns.begin(), contract.columns.end(),
        [&](Buffer const& column) { return column.name == tables.column && column.dims[1] == "Hkv"; });
    if (!numbered || !byHead)
    {
        field.at("column").contradicts("that of a behaviour blocks before it, by head", tables.column);
    }
    checkInputs(field, contract, tables.program, {"block_start", "block_length", "block_number"}, {});
    return tables;
}
} // namespace

BehaviourSpec readBehaviour(Field const& field, Contract const& contract)
{
    std::string const kind
        = field.at("kind").text({"make_room", "read_again", "isolated_turns", "nexus_turns", "blocks", "block_tables", "slot_tables"});
    if (kind == "make_room")
    {
        return readMakeRoom(field, contract, "full");
    }
    if (kind == "isolated_turns")
    {
        return readIsolatedTurns(field, contract);
    }
    if (kind == "read_again")
    {
        return readReadAgain(field, contract);
    }
    if (kind == "nexus_turns")
    {
        return readNexusTurns(field, contract);
    }
    if (kind == "slot_tables")
    {
        return readSlotTables(field, contract);
    }
    return readBlocks(field, contract, kind == "block_tables");
}
} // namespace semkv::runtime

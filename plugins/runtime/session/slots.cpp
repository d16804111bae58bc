#include "session/slots.h"

#include <algorithm>

namespace semkv::runtime
{
int64_t ChunkCounter::count(bool delimiter)
{
    chunk += afterDelimiter && !delimiter;
    afterDelimiter = delimiter;
    return 2 * chunk + delimiter;
}

Slots::Slots(Contract const& contract, int64_t rows, std::vector<uint8_t> delimiters)
    : batch(rows)
    , groups(contract.groups.size())
    , position(static_cast<size_t>(rows))
    , lengths(contract.groups.size() * static_cast<size_t>(rows))
    , turn(static_cast<size_t>(rows))
    , chunks(static_cast<size_t>(rows))
    , isDelimiter(std::move(delimiters))
{
    for (Buffer const& buffer : contract.columns)
    {
        names.push_back(buffer.name);
        columns.emplace_back();
        for (CacheGroup const& group : contract.groups)
        {
            Shape const shape = buffer.sizes(group, batch, contract.headDim);
            columns.back().push_back({shape[1], shape[2], std::vector<int64_t>(static_cast<size_t>(elements(shape)))});
        }
    }
}

void Slots::append(int64_t row, int64_t const* ids, size_t count, int64_t const* positions)
{
    size_t const r = static_cast<size_t>(row);
    for (size_t i = 0; i < count; ++i)
    {
        bool const nexus = ids[i] >= static_cast<int64_t>(isDelimiter.size());
        int64_t const chunk = chunks[r].count(!nexus && isDelimiter[static_cast<size_t>(ids[i])] != 0);
        for (size_t c = 0; c < names.size(); ++c)
        {
            // A column of some other name starts at 0, whatever the slot held before.
            int64_t const value = names[c] == "slot_position" ? (positions != nullptr ? positions[i] : position[r])
                : names[c] == "slot_chunk"                    ? chunk
                : names[c] == "slot_turn"                     ? 2 * turn[r] + nexus
                : names[c] == "slot_token"                    ? ids[i]
                                                              : 0;
            for (size_t group = 0; group < groups; ++group)
            {
                Column& column = columns[c][group];
                for (int64_t head = 0; head < column.heads; ++head)
                {
                    column.slots(row, head)[length(group, row)] = value;
                }
            }
        }
        for (size_t group = 0; group < groups; ++group)
        {
            ++length(group, row);
        }
        position[r] += positions == nullptr;
    }
}

void Slots::reset(Rows const& rows)
{
    for (int64_t row = 0; row < batch; ++row)
    {
        size_t const r = static_cast<size_t>(row);
        if (!rows[r])
        {
            continue;
        }
        position[r] = turn[r] = 0;
        chunks[r] = {};
        for (size_t group = 0; group < groups; ++group)
        {
            length(group, row) = 0;
        }
    }
}

int64_t Slots::kept(int64_t row) const
{
    int64_t most = 0;
    for (size_t group = 0; group < groups; ++group)
    {
        most = std::max(most, length(group, row));
    }
    return most;
}

std::vector<Column>& Slots::column(std::string const& name)
{
    return columns[static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin())];
}

Array Slots::lengthsOf(int64_t row) const
{
    int64_t const count = static_cast<int64_t>(groups);
    if (row < 0)
    {
        return Array::of({count, batch}, lengths);
    }
    Array array(Type::kInt64, {count, 1});
    for (size_t group = 0; group < groups; ++group)
    {
        array.as<int64_t>()[group] = length(group, row);
    }
    return array;
}
} // namespace semkv::runtime

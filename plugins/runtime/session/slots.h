// What a session knows of its slots: how many are live in each group and row, and which token each stands for.
#pragma once

#include "bundle/contract.h"
#include "common/tensor.h"

#include <string>
#include <vector>

namespace semkv::runtime
{
// Numbers the chunks of a growing text: a chunk opens with the first token that is no delimiter after one that is.
struct ChunkCounter
{
    int64_t chunk = 0;
    bool afterDelimiter = false;

    int64_t count(bool delimiter); // slot_chunk of the next token
};

// An int64 column of a group, [B, heads, capacity].
struct Column
{
    int64_t heads, capacity;
    std::vector<int64_t> values;

    int64_t* slots(int64_t row, int64_t head)
    {
        return values.data() + (row * heads + head) * capacity;
    }

    int64_t const* slots(int64_t row, int64_t head) const
    {
        return values.data() + (row * heads + head) * capacity;
    }
};

class Slots
{
public:
    Slots(Contract const& contract, int64_t batch, std::vector<uint8_t> isDelimiter);

    // Counts tokens, or Nexus rows (ids beyond the vocabulary), that were appended to a row, in every group. With
    // positions they stand for what was seen before; else they have those that follow.
    void append(int64_t row, int64_t const* ids, size_t count, int64_t const* positions = nullptr);
    void reset(Rows const& rows);

    int64_t length(size_t group, int64_t row) const
    {
        return lengths[group * static_cast<size_t>(batch) + static_cast<size_t>(row)];
    }

    int64_t& length(size_t group, int64_t row)
    {
        return lengths[group * static_cast<size_t>(batch) + static_cast<size_t>(row)];
    }

    int64_t at(int64_t row) const
    {
        return position[static_cast<size_t>(row)];
    }

    int64_t kept(int64_t row) const; // live slots of the fullest group

    std::vector<Column>& column(std::string const& name);

    // [groups, 1] of a row, or [groups, B] (kEveryRow): a decoder's input.
    Array lengthsOf(int64_t row) const;

    int64_t batch;
    size_t groups;
    std::vector<int64_t> position; // [B] tokens seen
    std::vector<int64_t> lengths;  // [groups,B] live slots
    std::vector<int64_t> turn;     // [B] turns that are finished, where a behaviour counts them
    std::vector<ChunkCounter> chunks;
    std::vector<std::string> names;
    std::vector<std::vector<Column>> columns; // by name, by group

    std::vector<uint8_t> const isDelimiter; // [vocab]
};
} // namespace semkv::runtime

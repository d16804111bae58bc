// Where some slots were evicted, each head's blocks are tabled for the decoder and mapped (SlotTables).
// As semkv_deploy/runtime/behaviours/slot_tables.py.
#pragma once

#include "behaviours/behaviour.h"

namespace semkv::runtime
{
// Slots behind each block of a head: runs of one number, of which neighbours are joined up to `join` slots. The last
// run is a block of its own.
Ids blockEnds(int64_t const* numbers, int64_t live, int64_t join);

// Tables follow from the slot column alone; what is noted here is only what saves work.
class SlotTabulator : public Behaviour
{
public:
    SlotTabulator(SlotTables const& spec, Engine& engine, Slots& slots);

    void stepInputs(int64_t row, Feeds& feeds) const override;
    void beforeAppend(Ids const& count) override;
    void appended(int64_t row, int64_t const* ids, size_t count) override;
    void endTurn(Rows const& rows) override;
    void compress(Rows const& rows) override;
    void reset(Rows const& rows) override;
    void restore(Feeds const& state, int64_t first) override;
    void takeBack(std::any const& snapshot) override;

private:
    // The table of a head over all groups, [most].
    int64_t* of(Ids& tables, int64_t row, int64_t head)
    {
        return tables.data() + (row * mHeads + head) * mSpec.most;
    }

    // Knows nothing of a row: with tokens it is tabled and mapped anew.
    void forget(int64_t row);
    // Brings tables up to what the slots are now; count tokens were appended to the row `grown`.
    void follow(int64_t grown, int64_t count);
    // The number of a row's last slot, -1 without one: heads end in the same window of tokens.
    int64_t lastNumber(int64_t row) const;
    void table(int64_t row, size_t group);
    // Runs the program for a row's blocks that are not mapped as they are; no head's last, which is open.
    void map(int64_t row);

    SlotTables const& mSpec;
    int64_t mHeads = 0;
    Ids mFirst;         // by group, its first head
    Ids mEnds, mMapped; // [B,heads,most]
    Ids mLength;        // [groups,B] of slots that are tabled
    Ids mNumber;        // [B] of the last slot then
};
} // namespace semkv::runtime

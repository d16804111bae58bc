// What is appended is cut into semantic blocks: every slot knows the number of its own (Blocks), or the decoder is told
// where they end and closed ones are mapped (BlockTables).
#pragma once

#include "behaviours/behaviour.h"
#include "behaviours/segmenter.h"

namespace semkv::runtime
{
class Segmenting : public Behaviour
{
public:
    Segmenting(BlockRule const& rule, Engine& engine, Slots& slots);

    void beginTurn(Rows const& rows) override;
    void takenBack(int64_t row) override;
    void reset(Rows const& rows) override;
    // open [n,longest]: codes, then less than kTurn; sums [n,domains]; closed [n]
    Feeds state(int64_t first, int64_t last) const override;
    void restore(Feeds const& state, int64_t first) override;
    std::any snapshot() const override;
    void takeBack(std::any const& snapshot) override;

protected:
    // After a row's segmenter was set back; slots have their positions and lengths of then.
    virtual void restored(int64_t row) = 0;

    // Lengths of the blocks that tokens close, in order.
    Ids cut(int64_t row, int64_t const* ids, size_t count);

    BlockRule const& mRule;
    std::vector<int64_t> const mCodes;
    std::vector<Segmenter> mSegmenters;

private:
    std::vector<Segmenter> mBegun; // as each row's turn began
};

class BlockKeeper : public Segmenting
{
public:
    using Segmenting::Segmenting;

    void appended(int64_t row, int64_t const* ids, size_t count) override;

protected:
    void restored(int64_t row) override;

private:
    // Gives the row's last tokens, one a number, their numbers, in slots that still hold them.
    void write(int64_t row, Ids const& numbers);
};

class BlockTabulator : public Segmenting
{
public:
    BlockTabulator(BlockRule const& rule, Engine& engine, Slots& slots);

    void stepInputs(int64_t row, Feeds& feeds) const override;
    void appended(int64_t row, int64_t const* ids, size_t count) override;
    void reset(Rows const& rows) override;
    Feeds state(int64_t first, int64_t last) const override; // and ends [n,most]
    void restore(Feeds const& state, int64_t first) override;

protected:
    void restored(int64_t row) override;

private:
    int64_t* ends(int64_t row)
    {
        return mEnds.data() + row * mRule.most;
    }

    void map(int64_t row, int64_t first, int64_t start, Ids const& lengths);

    Ids mEnds; // [B,most]
};
} // namespace semkv::runtime

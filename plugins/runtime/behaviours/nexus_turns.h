// Nexus turns: a finished turn's tokens leave the cache, and the Nexus rows that were appended for them stay (SONIC).
#pragma once

#include "behaviours/behaviour.h"

#include <utility>

namespace semkv::runtime
{
class TurnKeeper : public Behaviour
{
public:
    TurnKeeper(NexusTurns const& spec, Engine& engine, Slots& slots);

    bool makesRoom() const override
    {
        return true;
    }

    void beginTurn(Rows const& rows) override;
    int64_t due(int64_t row) const override;
    void beforeAppend(Ids const& count) override;
    void endTurn(Rows const& rows) override;
    void compress(Rows const& rows) override;

    bool pins() const override
    {
        return true;
    }

    void pin(Rows const& rows, Ids const& begun) override; // see pin.cpp
    void takenBack(int64_t row) override;
    void reset(Rows const& rows) override;
    Feeds state(int64_t first, int64_t last) const override; // turn, begun, ended: [n] each
    void restore(Feeds const& state, int64_t first) override;

    // Slots that a turn keeps from now on; see Session::keepOfTurns.
    void keep(double share, int64_t tokens);

    // Drops the Nexus rows of finished turns behind each turn's first `most`: as if it had never had more.
    void trim(int64_t most, Rows const& rows);

private:
    using Kept = std::vector<std::vector<uint8_t>>; // by row, by slot, whether it stays

    // Nexus rows of a row's turn, and how many of its last tokens stay; (0, all) where no token would go.
    std::pair<int64_t, int64_t> sizes(int64_t row) const;
    void end(Rows const& rows);
    void finish(Rows const& rows);
    // Runs Nexus rows for what has positions from first until before end, as a prompt of the row.
    void append(int64_t row, int64_t count, int64_t first, int64_t end);
    bool leaves(int64_t row, size_t group, size_t slot, int64_t first, int64_t end);

    // Ids and positions of a row's Nexus rows, `count` or, where fewer tokens are left to begin as, so many.
    std::pair<Ids, Ids> nexusRows(int64_t row, int64_t count, int64_t first, int64_t end);
    void makeRoom(Ids const& count);
    void cut(std::vector<uint8_t>& stays, size_t group, int64_t row, int64_t most);
    Kept live(size_t group) const;
    void drop(std::vector<Kept> const& keep);

    NexusTurns const& mSpec;
    double mKept;
    int64_t mTokens;
    Ids mBegun;
    Rows mEnded;
};
} // namespace semkv::runtime

// Isolated turns: a turn is compressed once, when it is over, and what older turns kept stays as it is. As
// semkv_deploy/runtime/behaviours/isolated_turns.py.
#pragma once

#include "behaviours/behaviour.h"

namespace semkv::runtime
{
class TurnIsolator : public Behaviour
{
public:
    TurnIsolator(IsolatedTurns const& spec, Engine& engine, Slots& slots);

    bool makesRoom() const override
    {
        return true;
    }

    bool pins() const override
    {
        return true;
    }

    Rows finishes(Rows const& rows) const override;
    void beginTurn(Rows const& rows) override;
    void beforeAppend(Ids const& count) override;
    void endTurn(Rows const& rows) override;
    void compress(Rows const& rows) override;
    void pin(Rows const& rows, Ids const& begun) override; // see pin.cpp
    void takenBack(int64_t row) override;
    void reset(Rows const& rows) override;
    Feeds state(int64_t first, int64_t last) const override; // frozen, pinned [n,groups]; begun, ended [n]
    void restore(Feeds const& state, int64_t first) override;

private:
    using Table = std::vector<Ids>; // by group, by row

    void end(Rows const& rows);
    void finish(Rows const& rows);
    void freeze(Rows const& rows);
    int64_t sinks(size_t group) const;

    // Slots that may be pinned in a group: older turns keep so many, however long the open one is.
    int64_t mostPinned(size_t group) const
    {
        return mSpec.keepSlots[group] - mSpec.keepSlots[group] / 2;
    }

    // Compresses open turns by themselves to `own` slots as far as there is room, and older ones where both together
    // are more than may stay; rows that are not wanted are left alone.
    void fit(std::vector<Rows> const& wanted, Table own, int64_t recentLeast);

    // Runs the program as often as a group has rows with different `sinks`.
    void runAlike(std::vector<Rows> wanted, Table const& sinks, Table const& target, Table const& recent);

    IsolatedTurns const& mSpec;
    Table mFrozen, mPinned; // first slots, those of finished turns; and of these the first that stay whatever comes
    Ids mBegun;
    Rows mEnded;
};
} // namespace semkv::runtime

// Making room: groups without room for the next append are compressed, and at turn ends all are, where asked.
#pragma once

#include "behaviours/behaviour.h"

namespace semkv::runtime
{
class RoomMaker : public Behaviour
{
public:
    RoomMaker(MakeRoom const& spec, Engine& engine, Slots& slots);

    bool makesRoom() const override
    {
        return true;
    }

    void beforeAppend(Ids const& count) override;
    void endTurn(Rows const& rows) override;
    void compress(Rows const& rows) override;

    bool pins() const override
    {
        return mPins;
    }

    void pin(Rows const& rows, Ids const& begun) override; // see pin.cpp
    void takenBack(int64_t row) override;

private:
    // By row, slots that a compression leaves at least, so that what a caller pinned has room beside its window.
    Ids leastWithPinned(size_t group) const;
    void run(std::map<size_t, Ids> const& targets);
    static double numberOf(Array const& value);

    MakeRoom const& mSpec;
    bool mPins;
};
} // namespace semkv::runtime

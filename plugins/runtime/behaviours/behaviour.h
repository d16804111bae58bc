// What a session asks of every behaviour, in the order of the contract. As semkv_deploy/runtime/behaviours/base.py.
#pragma once

#include "engine/engine.h"
#include "session/slots.h"

#include <any>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace semkv::runtime
{
struct CompressionStats
{
    int64_t runs = 0; // how often groups were compressed: those of one time count as one
    int64_t evicted = 0;
    double seconds = 0;
};

class Behaviour
{
public:
    Behaviour(Engine& engine, Slots& slots)
        : mEngine(engine)
        , mContract(engine.contract())
        , mSlots(slots)
    {
    }

    virtual ~Behaviour() = default;

    // Whether an append that does not fit can be made to.
    virtual bool makesRoom() const
    {
        return false;
    }

    // Decoder inputs of the behaviour's own, for a run of a row or of all.
    virtual void stepInputs(int64_t, Feeds&) const {}

    // Of these rows, those whose turn has ended and that it compresses before they go on.
    virtual Rows finishes(Rows const& rows) const
    {
        return Rows(rows.size(), 0);
    }

    // Before tokens are appended to these rows: what the end of their last turn left to be done is done.
    virtual void beginTurn(Rows const&) {}

    // Positions that beginTurn would take of a row.
    virtual int64_t due(int64_t) const
    {
        return 0;
    }

    // Before a run that appends count[row] tokens; afterwards they fit, if it makes room.
    virtual void beforeAppend(Ids const&) {}

    virtual void appended(int64_t, int64_t const*, size_t) {}

    virtual void endTurn(Rows const&) {}

    // Compresses these rows now, as at the end of a turn.
    virtual void compress(Rows const&) {}

    // Whether `pin` may be called.
    virtual bool pins() const
    {
        return false;
    }

    // Never drops what these rows appended from the positions `begun` on. Throws SEMKV_BAD_ARGUMENT where the capacity
    // is too small for that; nothing is pinned then.
    virtual void pin(Rows const&, Ids const& /*begun*/) {}

    // After a row's turn was taken back: its last tokens are gone, and it has not ended.
    virtual void takenBack(int64_t) {}

    virtual void reset(Rows const& rows);

    // What a saved session must hold of rows first to last-1 beyond their slots, by name.
    virtual Feeds state(int64_t, int64_t) const
    {
        return {};
    }

    // Takes over what `state` gave, of rows from `first` on; its arrays have the types and shapes that `state` gives.
    virtual void restore(Feeds const&, int64_t) {}

    // What a call that fails before anything changed for good is undone with.
    virtual std::any snapshot() const
    {
        return {};
    }

    // Forgets what was appended since; slots already have their old positions and lengths.
    virtual void takeBack(std::any const&) {}

    CompressionStats stats;
    int64_t changes = 0;   // how often it began to change what cannot be changed back
    bool changing = false; // whether it has begun and not ended
    std::vector<Behaviour const*> others; // the session's other ones

protected:
    // Runs a program on groups, and takes over the lengths and slot columns that come out.
    void runGroups(std::string const& program, std::map<size_t, Feeds> feeds);

    // Forgets what a float32 buffer, if there is one, says of a row's dead slots: it would be said of the next that lie
    // there.
    void clearDead(char const* buffer, int64_t row);

    Engine& mEngine;
    Contract const& mContract;
    Slots& mSlots;
};

std::unique_ptr<Behaviour> interpreter(BehaviourSpec const& spec, Engine& engine, Slots& slots);

// Seconds since it was made, added to a sum at its end.
class Timed
{
public:
    explicit Timed(double& sum);
    Timed(Timed const&) = delete;
    Timed& operator=(Timed const&) = delete;
    ~Timed();

private:
    double& mSum;
    double mStart;
};
} // namespace semkv::runtime

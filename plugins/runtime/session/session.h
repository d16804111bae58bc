// Many turns over one cache, for one or several batch rows. As semkv_deploy/runtime/session.py: the same calls on the
// same bundle leave the same slots, and give the same logits.
#pragma once

#include "behaviours/behaviour.h"
#include "engine/engine.h"
#include "session/safetensors.h"
#include "session/sampler.h"
#include "session/slots.h"

#include <any>
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace semkv::runtime
{
class TurnKeeper;

// Called with a row and a token as it is chosen; true ends the row's reply behind it.
using OnToken = std::function<bool(int64_t row, int64_t token)>;

// A call that is refused, or that fails before anything was compressed, leaves the session as it was. After a failure
// later than that the rows of the call hold part of what was given, and only `reset` is taken for them.
class Session
{
public:
    Session(std::shared_ptr<Bundle const> bundle, std::unique_ptr<Engine> engine);

    Contract const& contract() const
    {
        return mContract;
    }

    Engine const& engine() const
    {
        return *mEngine;
    }

    Slots const& slots() const
    {
        return mSlots;
    }

    int64_t batch() const
    {
        return mSlots.batch;
    }

    // [B,V] logits after the last token of each row (zeros for an empty one), valid until the next call.
    float const* prefill(std::vector<Ids> const& rows);

    // [B,V] logits after one token in each active row.
    float const* step(Ids const& ids, Rows const& active);

    // Prefills, then generates until a stop id, `most`, or the end of the row's context or cache.
    void generate(
        std::vector<Ids> const& rows, int64_t most, Sampling const& how, Ids const& stopIds, OnToken const& onToken);

    // Of one row, or of all (kEveryRow).
    void endTurn(int64_t row);
    void compress(int64_t row);
    void reset(int64_t row);

    // Takes back the last turn of a row, or of all, ended or not: what was appended since it began. Throws
    // SEMKV_BAD_ARGUMENT where there is none, or something was compressed since; every row is as it was then.
    void undoTurn(int64_t row);

    // Never drops what the open turn has so far. Throws SEMKV_BAD_ARGUMENT where the method cannot, or the capacity is
    // too small.
    void pin(int64_t row);

    // Whether the method makes something of turns as such: then `pin`, `keepOfTurns` and `trimTurns` may be called.
    bool keepsTurns() const;

    // Whether a turn that was compressed is over: what is appended then begins the next one.
    bool finishesTurns() const;

    // Slots that a turn keeps, for turns that are finished from now on: as a share of its tokens, or whatever its
    // length; the other is 0. Throws SEMKV_BAD_ARGUMENT where the method keeps no turns, or has fewer Nexus rows.
    void keepOfTurns(double share, int64_t tokens);

    // Drops the Nexus rows of finished turns behind each turn's first `tokens`, in one row or in all. Throws
    // SEMKV_BAD_ARGUMENT where the method keeps no turns, or for less than 1.
    void trimTurns(int64_t tokens, int64_t row);

    // Throws as `prefill` does where a row does not take these tokens, in whatever pieces they come.
    void checkAppend(int64_t row, Ids const& ids) const
    {
        checkIds(ids, "input_ids");
        refused(row, static_cast<int64_t>(ids.size()), true);
    }

    // Throws SEMKV_NEEDS_RESET where a row holds part of what a failed call was given.
    void checkRow(int64_t row) const
    {
        checkBroken(row);
    }

    // Whether a row takes one more token.
    bool hasRoom(int64_t row) const
    {
        return !refused(row, 1, false);
    }

    // Ends the call that runs, if one does, before its next run of the model. Safe from any thread.
    void cancel()
    {
        mCancelled = true;
    }

    CompressionStats stats() const;

    // See session/state.cpp.
    void save(std::string const& path, int64_t row, std::string const& note) const;
    std::string readNote(std::string const& path) const;
    void load(std::string const& path, int64_t row);

private:
    struct Counters
    {
        std::vector<int64_t> position, lengths;
        std::vector<ChunkCounter> chunks;
        std::vector<int64_t> changes;
        std::vector<std::any> behaviours;
    };

    // A row's counters when its turn began.
    struct TurnStart
    {
        int64_t position;
        Ids lengths; // by group
        ChunkCounter chunk;
    };

    Rows mask(int64_t row) const;
    Ids lengthsOf(size_t row) const;
    void forgetTurn(size_t row);
    void checkIds(Ids const& ids, char const* where) const;
    bool refused(int64_t row, int64_t count, bool fails) const; // whether a row does not take so many more tokens
    void checkBroken(int64_t row) const;
    void begin(Rows const& rows);
    void goOn() const; // throws where the call was cancelled
    Counters counted() const;
    void takeBack(Counters const& before);
    template <class Code>
    void undoneIfFailed(Code const& code);

    float const* prefillRows(std::vector<Ids> const& rows);
    void prefillRow(int64_t row, Ids const& ids);
    float const* stepRows(Ids const& ids, Rows const& active);
    float const* run(int64_t row, int64_t const* ids, int64_t count, int64_t logitsIndex);
    float const* runRows(int64_t first, int64_t rows, int64_t const* ids);
    Feeds feedsOf(int64_t row, int64_t const* ids, int64_t count, int64_t logitsIndex) const;
    TurnKeeper& keeper() const;
    void appended(int64_t row, int64_t const* ids, size_t count);

    // session/state.cpp
    Feeds tensors(int64_t first, int64_t last, bool content) const;
    std::map<std::string, std::string> identity() const;
    void checkIdentity(std::map<std::string, std::string> const& metadata, std::string const& path) const;
    void checkSaved(SavedTensors const& saved, std::string const& path, int64_t first, int64_t count) const;

    std::shared_ptr<Bundle const> mBundle;
    std::unique_ptr<Engine> mEngine;
    Contract const& mContract;
    Slots mSlots;
    std::vector<std::unique_ptr<Behaviour>> mBehaviours;
    Rows mOpen, mBroken;
    std::vector<std::optional<TurnStart>> mStarts;
    std::vector<float> mLogits; // [B,V]
    std::atomic<bool> mCancelled{false};
};

// A call that fails is undone: what it appended lies in dead slots then.
template <class Code>
void Session::undoneIfFailed(Code const& code)
{
    Counters const before = counted();
    try
    {
        code();
    }
    catch (...)
    {
        takeBack(before);
        throw;
    }
}
} // namespace semkv::runtime

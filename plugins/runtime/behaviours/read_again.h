// Reading again: before a compression, what was appended since the last one goes through the decoder once more.
#pragma once

#include "behaviours/behaviour.h"

namespace semkv::runtime
{
class Rereader : public Behaviour
{
public:
    Rereader(ReadAgain const& spec, Engine& engine, Slots& slots);

    void beginTurn(Rows const& rows) override;
    void beforeAppend(Ids const& count) override;
    void appended(int64_t row, int64_t const* ids, size_t count) override;
    void endTurn(Rows const& rows) override;
    void compress(Rows const& rows) override;
    void reset(Rows const& rows) override;
    Feeds state(int64_t first, int64_t last) const override; // unread [n, max context]: -1 behind the last
    void restore(Feeds const& state, int64_t first) override;

private:
    // Unread tokens of a row, below a position: what a failed call appended was taken back.
    size_t unreadBefore(int64_t row, int64_t position) const;
    void read(Rows const& rows);
    void run(int64_t row, int64_t const* ids, size_t count, int64_t number, int64_t runs);

    ReadAgain const& mSpec;
    std::vector<Ids> mUnread;
    Ids mUntil;
};
} // namespace semkv::runtime

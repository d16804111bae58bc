// What a turn is asked, how far it has come, and what its caller hears of it. As semkv_deploy/serve/turn.py.
#pragma once

#include "common/error.h"
#include "common/tensor.h"
#include "session/sampler.h"

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>

namespace semkv::runtime
{
using Clock = std::chrono::steady_clock;

enum class Fault
{
    kInvalid,     // what was asked for cannot be served
    kUnknown,     // a turn goes on with a session that is not there
    kUnavailable, // no row, or too many turns wait: the same call may succeed later
    kFailed,      // a failure that is not the request's
};

struct Failure
{
    Fault fault;
    std::string text;
};

inline Failure failure(Fault fault, Error const& error)
{
    return {fault, error.what()};
}

inline double seconds(Clock::duration time)
{
    return std::chrono::duration<double>(time).count();
}

enum class Reason
{
    kStop,      // a stop id
    kLength,    // the most tokens, or the end of the row's context or cache
    kCancelled, // its caller has gone
    kError
};

struct Request
{
    Ids ids;
    int64_t maxNewTokens = 256;
    Sampling sampling;
    Ids stopIds; // the model's own ends are added
    // True: the session begins with this turn, whatever there was of that name; false: it is gone on with, and refused
    // where there is none; none: either.
    std::optional<bool> start;
    bool endSession = false;
};

// The last that is heard of a turn: tokens that the session has seen with the prompt, and before it.
struct Finished
{
    Reason reason;
    int64_t promptTokens = 0, cachedTokens = 0;
    std::optional<Failure> failure;
};

// Hears of a turn, in the scheduler's thread; must not throw.
class Listener
{
public:
    virtual ~Listener() = default;
    virtual void token(int64_t id) noexcept = 0;
    virtual void finished(Finished const& end) noexcept = 0; // once, last of all
    virtual bool gone() noexcept = 0;                        // its caller: the turn is broken off
};

struct Turn
{
    Turn(std::string of, Request asked, std::unique_ptr<Listener> hears, Clock::time_point now)
        : session(std::move(of))
        , request(std::move(asked))
        , listener(std::move(hears))
        , submitted(now)
        , sampler(request.sampling)
    {
    }

    bool promptLeft() const
    {
        return appended < request.ids.size();
    }

    std::string session;
    Request request;
    std::unique_ptr<Listener> listener;
    Clock::time_point submitted, lastToken;
    Sampler sampler; // of this turn alone, so that what it draws depends on no other
    size_t appended = 0;
    int64_t before = 0, generated = 0;
    std::optional<int64_t> pending; // chosen, and not appended yet
};

struct Entry
{
    std::string key, name; // where the table has it, and what its caller calls it
    Clock::time_point used; // when a turn of it ended last
    int64_t row = -1;       // none yet
    std::deque<std::unique_ptr<Turn>> turns; // the running one, then those that wait
    bool running = false;
};
} // namespace semkv::runtime

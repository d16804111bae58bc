// What a turn is asked, how far it has come, and what its caller hears of it. As semkv_deploy/serve/turn.py.
#pragma once

#include "common/error.h"
#include "common/tensor.h"
#include "session/sampler.h"
#include "text/conversation.h"

#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

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

// A turn that is refused, and its session is as it was.
class Refused : public std::exception
{
public:
    Refused(Fault fault, Error const& error)
        : failure{fault, error.what()}
    {
    }

    char const* what() const noexcept override
    {
        return failure.text.c_str();
    }

    Failure failure;
};

// What a turn left of its session.
enum class Left
{
    kEnded,  // it ended as it should
    kUndone, // it was taken back, and the session is as before it
    kKept,   // it was kept as far as it had come, and ended
    kDropped // the session is gone
};

inline double seconds(Clock::duration time)
{
    return std::chrono::duration<double>(time).count();
}

enum class Reason
{
    kStop,      // a stop id or text
    kLength,    // the most tokens, or the end of the row's context or cache
    kCancelled, // its caller has gone
    kError
};

// What a turn is to do, given as one of ids, text and messages.
struct Request
{
    Ids ids;
    std::string text;        // to append as it is, without the chat template
    text::Messages messages; // of a chat, those that are new to the session, the user's last of all
    int64_t maxNewTokens = 256;
    Sampling sampling;
    Ids stopIds; // the model's own ends are added
    std::vector<std::string> stop;
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
    // Ids that were chosen, and the text that has become certain with them.
    virtual void piece(Ids const& ids, std::string const& text) noexcept = 0;
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
        return appended < ids.size();
    }

    std::string session;
    Request request;
    std::unique_ptr<Listener> listener;
    Clock::time_point submitted, lastToken;
    Sampler sampler; // of this turn alone, so that what it draws depends on no other
    Ids ids;                                 // of the prompt, once it has begun
    size_t pinned = 0, appended = 0;         // of them, those that stay for good, and those that the cache has
    std::optional<text::ReplyBuilder> reply; // once it has begun
    int64_t before = 0, generated = 0;
    std::optional<int64_t> pending; // chosen, and not appended yet
    bool cancelled = false;         // by the scheduler itself, which ends

    // Whether nobody is there for it any more.
    bool gone() const
    {
        return cancelled || listener->gone();
    }
};
} // namespace semkv::runtime

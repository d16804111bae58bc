// One engine for many sessions: each has a row, and steps of different sessions are one run. As
// semkv_deploy/serve/scheduler.py, but for texts and saved sessions.
//
// A round takes what came in, breaks off what was cancelled, begins turns for which there is a row, appends one piece
// of one prompt, and then one token in every row that generates. Everything that touches the session happens in rounds,
// in one thread; callers put turns in and listen.
#pragma once

#include "scheduler/turn.h"
#include "session/session.h"

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <variant>
#include <vector>

namespace semkv::runtime
{
struct SchedulerOptions
{
    double idleSeconds = 600; // how long a session keeps its row after a turn
    double waitSeconds = 30;  // how long a turn waits for a row; 0: it is refused at once
    int64_t maxWaiting = 256, maxSessions = 1024;
    int64_t maxTokens = 0; // of a reply; 0: as many as fit
};

// Counters since the start, and what is held now, by the names that the Python fronts give them.
struct Statistics
{
    int64_t promptTokens = 0, newTokens = 0, turns = 0, cancelled = 0, failed = 0, refused = 0, evicted = 0;
    int64_t compressions = 0;
    double compressSeconds = 0, firstTokenSeconds = 0, betweenTokensSeconds = 0;
    int64_t firstTokens = 0, betweenTokens = 0;
    int64_t sessions = 0, rowsUsed = 0, rows = 0, running = 0, waiting = 0, cacheBytes = 0;
};

class Scheduler
{
public:
    Scheduler(std::unique_ptr<Session> session, SchedulerOptions const& options);
    ~Scheduler(); // breaks off what runs and what waits

    // Puts a turn behind those of its session; a session that is not there begins with it. An empty name: the turn
    // stands alone. Where it is refused the listener hears so before this returns. From any thread.
    void submit(std::string const& session, Request request, std::unique_ptr<Listener> listener);

    // Forgets a session once its turns are done. From any thread.
    void endSession(std::string const& session);

    int64_t maxNewTokens() const
    {
        return mMaxTokens;
    }

    Statistics statistics() const;

private:
    using Came = std::variant<std::unique_ptr<Turn>, std::string>;

    void serve() noexcept;
    bool round();
    void takeIn();
    void endWhenDone(std::string const& name);
    void enter(std::unique_ptr<Turn> turn);
    void breakOff();
    bool beginTurns();
    bool begin(Entry& entry);
    void expire();
    bool appendPrompt();
    bool appendTokens();
    void choose(Entry& entry, float const* logits);

    bool holds(Entry const& entry) const;
    void forget(Entry& entry);
    void withdraw(Entry& entry, size_t number, std::optional<Failure> failure);
    void refuse(Turn& turn, std::optional<Failure> failure);
    void fail(Entry& entry, std::string const& why);
    bool takenBack(Entry& entry, bool keep, bool& undone);
    void end(Entry& entry, Reason reason);
    void finish(Entry& entry, Finished end, bool dropped, bool undone);
    void failAll(std::string const& why);
    void publish();

    std::unique_ptr<Session> mSession;
    SchedulerOptions const mOptions;
    int64_t mMaxTokens;
    std::map<std::string, std::unique_ptr<Entry>> mEntries;
    std::vector<int64_t> mFree;
    std::vector<Entry*> mRows; // by row, the session whose turn runs
    size_t mNextPrompt = 0;
    uint64_t mNameless = 0;
    Statistics mCounted;
    int64_t mCompressed = 0;
    double mCompressSeconds = 0;

    mutable std::mutex mLock;
    std::condition_variable mChanged;
    std::vector<Came> mInbox;
    int64_t mWaiting = 0;
    Statistics mPublished;
    int64_t mTurnedAway = 0; // turns that never came in
    std::string mFailure; // the mistake that ended the rounds
    bool mClosed = false;
    std::thread mThread; // last: it begins when all else is there
};
} // namespace semkv::runtime

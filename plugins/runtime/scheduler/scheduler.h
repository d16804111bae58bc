// One engine for many sessions: each has a row, and steps of different sessions are one run. As
// semkv_deploy/serve/scheduler.py.
//
// A round takes what came in, breaks off what was cancelled, begins turns for which there is a row, appends one piece
// of one prompt, and then one token in every row that generates. Everything that touches the session happens in rounds,
// in one thread; callers put turns in and listen.
#pragma once

#include "scheduler/table.h"
#include "scheduler/turn.h"
#include "session/session.h"
#include "text/texts.h"

#include <condition_variable>
#include <functional>
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
    int64_t maxTokens = 0;    // of a reply; 0: as many as fit
    std::string saveSessions; // folder where idle sessions are saved; empty: they are forgotten
    bool shareSessions = false; // that folder is shared with other servers
    // Told what no caller hears of, such as a session that cannot be saved; from the scheduler's thread.
    std::function<void(std::string const&)> warn = [](std::string const&) {};
};

class Scheduler
{
public:
    // Args: the bundle's texts, for turns that are given or shown as such.
    Scheduler(std::unique_ptr<Session> session, std::shared_ptr<text::Texts const> texts,
        SchedulerOptions const& options);
    ~Scheduler(); // breaks off what runs and what waits, and saves sessions where that was asked for

    // Puts a turn behind those of its session; a session that is not there begins with it. An empty name: the turn
    // stands alone. Where it is refused the listener hears so before this returns. From any thread.
    void submit(std::string const& session, Request request, std::unique_ptr<Listener> listener);

    // Forgets a session once its turns are done. From any thread.
    void endSession(std::string const& session);

    int64_t maxNewTokens() const
    {
        return mMaxTokens;
    }

    text::Texts const& texts() const
    {
        return *mTexts;
    }

    Statistics statistics() const;

private:
    using Came = std::variant<std::unique_ptr<Turn>, std::string>;

    void check(Request const& request) const;
    void serve() noexcept;
    bool round();
    void takeIn();
    void endWhenDone(std::string const& name);
    void enter(std::unique_ptr<Turn> turn);
    void breakOff();
    bool beginTurns();
    std::optional<Failure> prepare(Entry& entry, Turn const& turn);
    void begin(Entry& entry);
    Ids promptOf(Entry& entry, Turn& turn);
    bool appendPrompt();
    bool appendTokens();
    void choose(Entry& entry, float const* logits);

    void withdraw(Entry& entry, size_t number, std::optional<Failure> failure);
    void refuse(Turn& turn, std::optional<Failure> failure);
    void fail(Entry& entry, std::string const& why);
    Left takenBack(Entry& entry, bool keep);
    void record(Entry& entry);
    void end(Entry& entry, Reason reason);
    void finish(Entry& entry, Finished end, Left left);
    void lose(Entry& entry, std::string const& why);
    void failAll(std::string const& why);
    void publish();

    std::unique_ptr<Session> mSession;
    std::shared_ptr<text::Texts const> mTexts;
    SchedulerOptions const mOptions;
    int64_t mMaxTokens;
    std::vector<Entry*> mRows; // by row, the session whose turn runs
    size_t mNextPrompt = 0;
    Statistics mCounted;
    std::unique_ptr<SessionTable> mTable;
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

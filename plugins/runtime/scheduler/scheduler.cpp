// What callers do, the rounds, and the turns that begin in them.
#include "scheduler/scheduler.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
// Between looks at clients that may have gone and turns that wait, while nothing runs.
constexpr std::chrono::milliseconds kLook{50};
} // namespace

Scheduler::Scheduler(std::unique_ptr<Session> session, SchedulerOptions const& options)
    : mSession(std::move(session))
    , mOptions(options)
    , mMaxTokens(options.maxTokens > 0 ? std::min(options.maxTokens, mSession->contract().maxContext)
                                       : mSession->contract().maxContext)
    , mRows(static_cast<size_t>(mSession->batch()), nullptr)
{
    for (int64_t row = 0; row < mSession->batch(); ++row)
    {
        mFree.push_back(row);
    }
    publish();
    mThread = std::thread([this] { serve(); });
}

Scheduler::~Scheduler()
{
    {
        std::lock_guard<std::mutex> const guard(mLock);
        mClosed = true;
        mChanged.notify_all();
    }
    mThread.join();
}

void Scheduler::submit(std::string const& session, Request request, std::unique_ptr<Listener> listener)
{
    std::optional<Failure> refusal;
    std::unique_ptr<Turn> turn;
    try
    {
        if (request.maxNewTokens < 1 || request.maxNewTokens > mMaxTokens)
        {
            throw Error(SEMKV_BAD_ARGUMENT, "out of range")
                .where("max_tokens")
                .expected("1 to " + std::to_string(mMaxTokens))
                .got(std::to_string(request.maxNewTokens));
        }
        // Made before anything else: it refuses a sampling that is out of range.
        Sampler const checked(request.sampling);
        turn = std::make_unique<Turn>(session, std::move(request), std::move(listener), Clock::now());
    }
    catch (Error const& error)
    {
        listener->finished({Reason::kError, 0, 0, failure(Fault::kInvalid, error)});
        return;
    }
    {
        std::lock_guard<std::mutex> const guard(mLock);
        if (mClosed || !mFailure.empty())
        {
            refusal = Failure{
                Fault::kUnavailable, "scheduler: the server " + (mClosed ? "is ending" : "failed: " + mFailure) + "."};
        }
        else if (mWaiting + static_cast<int64_t>(mInbox.size()) >= mOptions.maxWaiting)
        {
            refusal = failure(Fault::kUnavailable,
                Error(SEMKV_RUNTIME, "too many turns wait")
                    .where("scheduler")
                    .expected("at most " + std::to_string(mOptions.maxWaiting)));
            ++mTurnedAway;
        }
        else
        {
            mInbox.emplace_back(std::move(turn));
            mChanged.notify_all();
            return;
        }
    }
    turn->listener->finished({Reason::kError, 0, 0, refusal});
}

void Scheduler::endSession(std::string const& session)
{
    std::lock_guard<std::mutex> const guard(mLock);
    mInbox.emplace_back(session);
    mChanged.notify_all();
}

Statistics Scheduler::statistics() const
{
    std::lock_guard<std::mutex> const guard(mLock);
    Statistics now = mPublished;
    now.waiting = mWaiting + static_cast<int64_t>(mInbox.size());
    now.turns += mTurnedAway;
    now.failed += mTurnedAway;
    now.refused += mTurnedAway;
    return now;
}

void Scheduler::serve() noexcept
{
    try
    {
        for (;;)
        {
            bool const worked = round();
            publish();
            std::unique_lock<std::mutex> lock(mLock);
            if (mClosed)
            {
                break;
            }
            if (!worked && mInbox.empty())
            {
                mChanged.wait_for(lock, kLook);
            }
        }
        takeIn();
        failAll("the model was unloaded");
    }
    catch (std::exception const& error)
    {
        // A mistake of ours: nobody may wait for ever, and nobody is served by what is in an unknown state.
        {
            std::lock_guard<std::mutex> const guard(mLock);
            mFailure = error.what();
        }
        takeIn();
        failAll(error.what());
    }
    publish();
}

void Scheduler::publish()
{
    std::lock_guard<std::mutex> const guard(mLock);
    CompressionStats const of = mSession->stats();
    // A session of one row counts anew when it is reset.
    bool const anew = of.runs < mCompressed;
    mCounted.compressions += of.runs - (anew ? 0 : mCompressed);
    mCounted.compressSeconds += of.seconds - (anew ? 0 : mCompressSeconds);
    mCompressed = of.runs;
    mCompressSeconds = of.seconds;
    mCounted.sessions = static_cast<int64_t>(mEntries.size());
    mCounted.rows = mSession->batch();
    mCounted.rowsUsed = mCounted.rows - static_cast<int64_t>(mFree.size());
    mCounted.running = std::count_if(mRows.begin(), mRows.end(), [](Entry* entry) { return entry != nullptr; });
    mCounted.cacheBytes = mSession->engine().cacheBytes();
    mPublished = mCounted;
}

bool Scheduler::round()
{
    takeIn();
    breakOff();
    bool worked = beginTurns();
    expire();
    worked |= appendPrompt();
    worked |= appendTokens();
    return worked;
}

void Scheduler::takeIn()
{
    std::vector<Came> came;
    {
        std::lock_guard<std::mutex> const guard(mLock);
        came.swap(mInbox);
        // Counted before the lock is let go, so that no turn is in neither number.
        mWaiting += std::count_if(came.begin(), came.end(),
            [](Came const& each) { return std::holds_alternative<std::unique_ptr<Turn>>(each); });
    }
    for (Came& each : came)
    {
        if (auto* const name = std::get_if<std::string>(&each))
        {
            endWhenDone(*name);
        }
        else
        {
            enter(std::move(std::get<std::unique_ptr<Turn>>(each)));
        }
    }
}

// Ends turns whose callers have gone: the running one is taken back, or kept as far as it had come.
void Scheduler::breakOff()
{
    std::vector<Entry*> entries; // one that is forgotten takes no other with it
    for (auto const& [key, entry] : mEntries)
    {
        entries.push_back(entry.get());
    }
    for (Entry* const entry : entries)
    {
        for (size_t number = entry->turns.size(); number-- > 1;)
        {
            if (entry->turns[number]->listener->gone())
            {
                withdraw(*entry, number, std::nullopt);
            }
        }
        if (entry->turns.empty() || !entry->turns.front()->listener->gone())
        {
            continue;
        }
        if (!entry->running)
        {
            withdraw(*entry, 0, std::nullopt);
            continue;
        }
        bool undone = false;
        bool const dropped = !takenBack(*entry, true, undone);
        finish(*entry, {Reason::kCancelled, 0, 0, std::nullopt}, dropped, undone);
    }
}

// Begins the first turn of every session that has, or gets, a row: the longest waiting first. Returns whether one was
// not to be begun, so that there is another round for the next of its session.
bool Scheduler::beginTurns()
{
    int64_t const before = mCounted.turns;
    std::vector<Entry*> waiting;
    for (auto const& [key, entry] : mEntries)
    {
        if (!entry->turns.empty() && !entry->running)
        {
            waiting.push_back(entry.get());
        }
    }
    std::sort(waiting.begin(), waiting.end(), [](Entry const* one, Entry const* other) {
        return one->turns.front()->submitted < other->turns.front()->submitted;
    });
    for (Entry* const entry : waiting)
    {
        Turn& turn = *entry->turns.front();
        if (turn.request.start == true && entry->row >= 0)
        {
            mSession->reset(entry->row);
        }
        if (turn.request.start == false && !holds(*entry))
        {
            withdraw(*entry, 0,
                failure(Fault::kUnknown,
                    Error(SEMKV_RUNTIME,
                        "there is no such session: it never began, has ended, or lost its row while it was idle")
                        .where("session " + entry->name)
                        .fix("begin it anew, with all that was said")));
            continue;
        }
        if (entry->row < 0 && !mFree.empty())
        {
            entry->row = mFree.back();
            mFree.pop_back();
            mSession->reset(entry->row);
        }
        if (entry->row >= 0)
        {
            begin(*entry);
        }
        else if (seconds(Clock::now() - turn.submitted) >= mOptions.waitSeconds)
        {
            int64_t const running
                = std::count_if(mRows.begin(), mRows.end(), [](Entry* each) { return each != nullptr; });
            withdraw(*entry, 0,
                failure(Fault::kUnavailable,
                    Error(SEMKV_RUNTIME, "no row is free")
                        .where(turn.session.empty() ? "a turn without a session" : "session " + entry->name)
                        .got(std::to_string(running) + " of " + std::to_string(mRows.size())
                            + " rows generate, the others hold sessions")));
        }
    }
    return mCounted.turns > before;
}
} // namespace semkv::runtime

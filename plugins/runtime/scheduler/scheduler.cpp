// What callers do, and the thread that does it.
#include "scheduler/scheduler.h"

#include "scheduler/shared_table.h"

#include <algorithm>

namespace semkv::runtime
{
namespace
{
// Between looks at clients that may have gone and turns that wait, while nothing runs.
constexpr std::chrono::milliseconds kLook{50};
} // namespace

Scheduler::Scheduler(
    std::unique_ptr<Session> session, std::shared_ptr<text::Texts const> texts, SchedulerOptions const& options)
    : mSession(std::move(session))
    , mTexts(std::move(texts))
    , mOptions(options)
    , mMaxTokens(options.maxTokens > 0 ? std::min(options.maxTokens, mSession->contract().maxContext)
                                       : mSession->contract().maxContext)
    , mRows(static_cast<size_t>(mSession->batch()), nullptr)
{
    TableOf const of{*mSession, *mTexts, mCounted, options.maxSessions, options.warn};
    if (options.shareSessions)
    {
        mTable = std::make_unique<SharedTable>(of, options.saveSessions, Clock::now());
    }
    else
    {
        OnFull const onFull = options.saveSessions.empty() ? OnFull::kRefuse : OnFull::kSave;
        mTable = std::make_unique<SessionTable>(of, onFull, options.saveSessions, Clock::now());
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
        check(request);
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
        // What runs is taken back or ended, what waits is not begun, and then sessions are saved.
        takeIn();
        for (auto const& [name, entry] : mTable->entries())
        {
            for (auto const& turn : entry->turns)
            {
                turn->cancelled = true;
            }
        }
        breakOff();
        mTable->expire(Clock::time_point::max(), Clock::now());
    }
    catch (std::exception const& error)
    {
        // A mistake of ours: nobody may wait for ever, and nobody is served by what is in an unknown state.
        {
            std::lock_guard<std::mutex> const guard(mLock);
            mFailure = error.what();
        }
        failAll(error.what());
    }
    mTable->close();
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
    mCounted.sessions = static_cast<int64_t>(mTable->entries().size());
    mCounted.rows = mSession->batch();
    mCounted.rowsUsed = mTable->rowsUsed();
    mCounted.running = std::count_if(mRows.begin(), mRows.end(), [](Entry* entry) { return entry != nullptr; });
    mCounted.cacheBytes = mSession->engine().cacheBytes();
    mPublished = mCounted;
}
} // namespace semkv::runtime

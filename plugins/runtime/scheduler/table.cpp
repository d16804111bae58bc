// The table of sessions: how they enter it, and how they and turns that have not begun leave it.
#include "scheduler/scheduler.h"

#include <algorithm>

namespace semkv::runtime
{
void Scheduler::endWhenDone(std::string const& name)
{
    auto const found = mEntries.find("named " + name);
    if (found != mEntries.end() && !found->second->turns.empty())
    {
        found->second->turns.back()->request.endSession = true;
    }
    else if (found != mEntries.end())
    {
        forget(*found->second);
    }
}

void Scheduler::enter(std::unique_ptr<Turn> turn)
{
    // No name that a caller gives is that of a turn without one.
    std::string const key
        = turn->session.empty() ? "nameless " + std::to_string(++mNameless) : "named " + turn->session;
    if (mEntries.count(key) == 0)
    {
        if (static_cast<int64_t>(mEntries.size()) >= mOptions.maxSessions)
        {
            refuse(*turn,
                failure(Fault::kUnavailable,
                    Error(SEMKV_RUNTIME, "too many sessions")
                        .where("scheduler")
                        .expected("at most " + std::to_string(mOptions.maxSessions))));
            return;
        }
        auto entry = std::make_unique<Entry>();
        entry->key = key;
        entry->name = turn->session;
        entry->used = Clock::now();
        mEntries[key] = std::move(entry);
    }
    mEntries.at(key)->turns.push_back(std::move(turn));
}

void Scheduler::expire()
{
    Clock::time_point const now = Clock::now();
    std::vector<Entry*> idle;
    for (auto const& [key, entry] : mEntries)
    {
        if (entry->turns.empty() && entry->row >= 0 && seconds(now - entry->used) > mOptions.idleSeconds)
        {
            idle.push_back(entry.get());
        }
    }
    for (Entry* const entry : idle)
    {
        forget(*entry);
        ++mCounted.evicted;
    }
}

// Whether there is anything of a session.
bool Scheduler::holds(Entry const& entry) const
{
    return entry.row >= 0 && mSession->slots().at(entry.row) > 0;
}

// Ends a session: its row is free.
void Scheduler::forget(Entry& entry)
{
    if (entry.row >= 0)
    {
        mFree.push_back(entry.row);
    }
    mEntries.erase(std::string(entry.key));
}

// Ends a turn that has not begun; a session that has no other, and never had one, was none.
void Scheduler::withdraw(Entry& entry, size_t number, std::optional<Failure> reason)
{
    std::unique_ptr<Turn> const turn = std::move(entry.turns[number]);
    entry.turns.erase(entry.turns.begin() + static_cast<std::ptrdiff_t>(number));
    if (entry.turns.empty() && (turn->request.endSession || !holds(entry)))
    {
        forget(entry);
    }
    refuse(*turn, std::move(reason));
}

// Tells a turn that had not begun that it will not; none: it was cancelled.
void Scheduler::refuse(Turn& turn, std::optional<Failure> reason)
{
    {
        std::lock_guard<std::mutex> const guard(mLock);
        --mWaiting;
    }
    ++mCounted.turns;
    mCounted.cancelled += !reason;
    mCounted.failed += reason.has_value();
    mCounted.refused += reason && reason->fault == Fault::kUnavailable;
    turn.listener->finished({reason ? Reason::kError : Reason::kCancelled, 0, 0, std::move(reason)});
}
} // namespace semkv::runtime

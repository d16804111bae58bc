// Ends of turns: what they leave of their sessions, and what their callers hear.
#include "scheduler/scheduler.h"

#include <algorithm>

namespace semkv::runtime
{
// Makes a session what it was before its running turn, or says what it made of it. With `keep`, where it cannot be
// because something was compressed meanwhile, a turn whose prompt is whole is ended.
Left Scheduler::takenBack(Entry& entry, bool keep)
{
    Turn& turn = *entry.turns.front();
    if (turn.pinned > 0 && turn.appended >= turn.pinned)
    {
        // What is pinned is no part of the turn any more; it opened the conversation, which begins anew.
        return Left::kDropped;
    }
    try
    {
        mSession->checkRow(entry.row);
        if (turn.appended > 0)
        {
            mSession->undoTurn(entry.row);
        }
        return Left::kUndone;
    }
    catch (Error const&)
    {
        if (!keep || turn.promptLeft())
        {
            return Left::kDropped;
        }
    }
    try
    {
        mSession->checkRow(entry.row);
        turn.reply->flush();
        mSession->endTurn(entry.row);
        record(entry);
        return Left::kKept;
    }
    catch (std::exception const&)
    {
        return Left::kDropped;
    }
}

// A turn is no longer running. The entry may be gone afterwards, unless the caller holds it.
void Scheduler::finish(Entry& entry, Finished last, Left left)
{
    mRows[static_cast<size_t>(entry.row)] = nullptr;
    entry.running = false;
    if (!entry.turns.front()->request.endSession)
    {
        left = mTable->turnEnded(entry, left);
    }
    std::unique_ptr<Turn> const turn = std::move(entry.turns.front());
    entry.turns.pop_front();
    entry.used = Clock::now();
    ++mCounted.turns;
    mCounted.cancelled += last.reason == Reason::kCancelled;
    mCounted.failed += last.reason == Reason::kError;
    // A session whose only turn was taken back has never begun: there is nothing to hold a row for.
    bool const nothing = left == Left::kUndone && turn->before == 0;
    if (left == Left::kDropped)
    {
        lose(entry, last.failure ? last.failure->text : "a turn that was broken off");
    }
    else if ((turn->request.endSession || nothing) && entry.turns.empty())
    {
        mTable->forget(entry);
    }
    else if (turn->request.endSession)
    {
        mTable->renew(entry);
    }
    last.promptTokens = turn->before + static_cast<int64_t>(turn->appended);
    last.cachedTokens = turn->before;
    turn->listener->finished(last);
}

// Forgets a session, and tells the turns that wait for it.
void Scheduler::lose(Entry& entry, std::string const& why)
{
    Failure const gone
        = failure(Fault::kFailed, Error(SEMKV_RUNTIME, "the session is gone").where("session " + entry.name).got(why));
    while (!entry.turns.empty())
    {
        std::unique_ptr<Turn> const next = std::move(entry.turns.front());
        entry.turns.pop_front();
        refuse(*next, gone);
    }
    mTable->forget(entry);
}

// Ends a turn that has not begun; a session that has no other, and never had one, was none.
void Scheduler::withdraw(Entry& entry, size_t number, std::optional<Failure> reason)
{
    std::unique_ptr<Turn> const turn = std::move(entry.turns[number]);
    entry.turns.erase(entry.turns.begin() + static_cast<std::ptrdiff_t>(number));
    if (entry.turns.empty() && (turn->request.endSession || !mTable->holds(entry)))
    {
        mTable->forget(entry);
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

// Gives up every turn, without another call of the engine.
void Scheduler::failAll(std::string const& why)
{
    std::vector<std::unique_ptr<Turn>> left;
    for (auto const& [key, entry] : mTable->entries())
    {
        for (auto& turn : entry->turns)
        {
            left.push_back(std::move(turn));
        }
        entry->turns.clear();
        entry->running = false;
    }
    std::fill(mRows.begin(), mRows.end(), nullptr);
    {
        std::lock_guard<std::mutex> const guard(mLock);
        mWaiting = 0;
        for (Came& came : mInbox)
        {
            if (auto* const turn = std::get_if<std::unique_ptr<Turn>>(&came))
            {
                left.push_back(std::move(*turn));
            }
        }
        mInbox.clear();
    }
    for (auto const& turn : left)
    {
        ++mCounted.turns;
        ++mCounted.failed;
        turn->listener->finished({Reason::kError, 0, 0, Failure{Fault::kUnavailable, why + "."}});
    }
}
} // namespace semkv::runtime

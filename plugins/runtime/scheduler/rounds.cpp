// Rounds, and the turns that begin in them.
#include "scheduler/scheduler.h"

#include <algorithm>

namespace semkv::runtime
{
bool Scheduler::round()
{
    takeIn();
    breakOff();
    bool worked = beginTurns();
    Clock::time_point const now = Clock::now();
    auto const idle = std::chrono::duration<double>(mOptions.idleSeconds);
    mTable->expire(now - std::chrono::duration_cast<Clock::duration>(idle), now);
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

void Scheduler::endWhenDone(std::string const& name)
{
    std::shared_ptr<Entry> const entry = mTable->known(name);
    if (entry != nullptr && !entry->turns.empty())
    {
        entry->turns.back()->request.endSession = true;
    }
    else if (entry != nullptr)
    {
        mTable->forget(*entry);
    }
}

void Scheduler::enter(std::unique_ptr<Turn> turn)
{
    try
    {
        mTable->enter(turn->session, Clock::now()).turns.push_back(std::move(turn));
    }
    catch (Refused const& refusal)
    {
        refuse(*turn, refusal.failure);
    }
}

// Ends turns whose callers have gone: the running one is taken back, or kept as far as it had come.
void Scheduler::breakOff()
{
    auto const entries = mTable->entries(); // one that is forgotten takes no other with it
    for (auto const& [name, entry] : entries)
    {
        for (size_t number = entry->turns.size(); number-- > 1;)
        {
            if (entry->turns[number]->gone())
            {
                withdraw(*entry, number, std::nullopt);
            }
        }
        if (entry->turns.empty() || !entry->turns.front()->gone())
        {
            continue;
        }
        if (!entry->running)
        {
            withdraw(*entry, 0, std::nullopt);
            continue;
        }
        Left const left = takenBack(*entry, true);
        finish(*entry, {Reason::kCancelled, 0, 0, std::nullopt}, left);
    }
}

// Begins the first turn of every session that has, or gets, a row: the longest waiting first. Returns whether one was
// not to be begun, so that there is another round for the next of its session.
bool Scheduler::beginTurns()
{
    int64_t const before = mCounted.turns;
    std::vector<std::shared_ptr<Entry>> waiting;
    for (auto const& [name, entry] : mTable->entries())
    {
        if (!entry->turns.empty() && !entry->running)
        {
            waiting.push_back(entry);
        }
    }
    std::sort(waiting.begin(), waiting.end(), [](auto const& one, auto const& other) {
        return one->turns.front()->submitted < other->turns.front()->submitted;
    });
    for (std::shared_ptr<Entry> const& entry : waiting)
    {
        Turn const& turn = *entry->turns.front();
        std::optional<Failure> missing;
        try
        {
            missing = prepare(*entry, turn);
        }
        catch (Refused const& refusal)
        {
            withdraw(*entry, 0, refusal.failure);
            continue;
        }
        catch (std::exception const& error)
        {
            mOptions.warn(std::string("a saved session cannot be gone on with: ") + error.what());
            lose(*entry, error.what());
            continue;
        }
        if (!missing)
        {
            begin(*entry);
        }
        else if (seconds(Clock::now() - turn.submitted) >= mOptions.waitSeconds)
        {
            withdraw(*entry, 0, missing);
        }
    }
    return mCounted.turns > before;
}

// Gives a session what its next turn needs, or says what it has to wait for. Throws Refused where it is of no use to
// wait, or the turn goes on with what is not there; Error when what was saved of the session cannot be read.
std::optional<Failure> Scheduler::prepare(Entry& entry, Turn const& turn)
{
    std::string const where = entry.nameless ? "a turn without a session" : "session " + entry.name;
    if (!mTable->claim(entry))
    {
        return failure(Fault::kUnavailable,
            Error(SEMKV_RUNTIME, "another server runs a turn of the session").where(where));
    }
    if (turn.request.start == true)
    {
        mTable->renew(entry);
    }
    else if (turn.request.start == false && !mTable->holds(entry))
    {
        throw Refused(Fault::kUnknown,
            Error(SEMKV_RUNTIME,
                "there is no such session: it never began, has ended, or lost its row while it was idle")
                .where(where)
                .fix("begin it anew, with all that was said"));
    }
    if (mTable->giveRow(entry))
    {
        return std::nullopt;
    }
    auto const running = std::count_if(mRows.begin(), mRows.end(), [](Entry* each) { return each != nullptr; });
    return failure(Fault::kUnavailable,
        Error(SEMKV_RUNTIME, "no row is free")
            .where(where)
            .got(std::to_string(running) + " of " + std::to_string(mRows.size())
                + " rows generate, the others hold sessions"));
}
} // namespace semkv::runtime

// Turns that have a row: their prompts are appended piece by piece, and one token to all of them in one run. What a
// turn does to its session ends here too. As semkv_deploy/serve/running.py.
#include "scheduler/scheduler.h"

#include <algorithm>

namespace semkv::runtime
{
bool Scheduler::begin(Entry& entry)
{
    Turn& turn = *entry.turns.front();
    try
    {
        mSession->checkAppend(entry.row, turn.request.ids);
    }
    catch (Error const& error)
    {
        withdraw(entry, 0, failure(Fault::kInvalid, error));
        return false;
    }
    turn.before = mSession->slots().at(entry.row);
    mRows[static_cast<size_t>(entry.row)] = &entry;
    entry.running = true;
    std::lock_guard<std::mutex> const guard(mLock);
    --mWaiting;
    return true;
}

// Appends one piece of one prompt; turns take turns. False when no prompt is left.
bool Scheduler::appendPrompt()
{
    size_t const rows = mRows.size();
    size_t row = rows;
    for (size_t i = 0; i < rows && row == rows; ++i)
    {
        Entry const* const entry = mRows[(mNextPrompt + i) % rows];
        row = entry != nullptr && entry->turns.front()->promptLeft() ? (mNextPrompt + i) % rows : rows;
    }
    if (row == rows)
    {
        return false;
    }
    mNextPrompt = row + 1;
    Entry& entry = *mRows[row];
    Turn& turn = *entry.turns.front();
    size_t const count = std::min(
        turn.request.ids.size() - turn.appended, static_cast<size_t>(mSession->contract().prefillChunk));
    std::vector<Ids> prompts(rows);
    auto const from = turn.request.ids.begin() + static_cast<std::ptrdiff_t>(turn.appended);
    prompts[row].assign(from, from + static_cast<std::ptrdiff_t>(count));
    try
    {
        float const* const logits = mSession->prefill(prompts);
        turn.appended += count;
        mCounted.promptTokens += static_cast<int64_t>(count);
        if (!turn.promptLeft())
        {
            choose(entry, logits + static_cast<int64_t>(row) * mSession->contract().vocabSize);
        }
    }
    catch (std::exception const& error)
    {
        fail(entry, error.what());
    }
    return true;
}

// Appends one token in every row that has chosen one, in one run, and chooses the next.
bool Scheduler::appendTokens()
{
    Ids ids(mRows.size(), 0);
    Rows active(mRows.size(), 0);
    std::vector<Entry*> chosen;
    for (size_t row = 0; row < mRows.size(); ++row)
    {
        if (mRows[row] != nullptr && mRows[row]->turns.front()->pending)
        {
            ids[row] = *mRows[row]->turns.front()->pending;
            active[row] = 1;
            chosen.push_back(mRows[row]);
        }
    }
    if (chosen.empty())
    {
        return false;
    }
    float const* logits = nullptr;
    try
    {
        logits = mSession->step(ids, active);
    }
    catch (std::exception const& error)
    {
        // Which row made it fail is not known: none of them has its token.
        std::string const why = error.what();
        for (Entry* const entry : chosen)
        {
            fail(*entry, why);
        }
        return true;
    }
    // Copied: the end of one row's turn may run the model, and logits live until then.
    int64_t const vocab = mSession->contract().vocabSize;
    std::vector<float> const held(logits, logits + static_cast<int64_t>(mRows.size()) * vocab);
    for (Entry* const entry : chosen)
    {
        Turn& turn = *entry->turns.front();
        turn.pending.reset();
        try
        {
            if (turn.generated == turn.request.maxNewTokens)
            {
                end(*entry, Reason::kLength);
            }
            else
            {
                choose(*entry, held.data() + entry->row * vocab);
            }
        }
        catch (std::exception const& error)
        {
            fail(*entry, error.what());
        }
    }
    return true;
}

void Scheduler::choose(Entry& entry, float const* logits)
{
    Turn& turn = *entry.turns.front();
    int64_t const token = turn.sampler.choose(logits, mSession->contract().vocabSize);
    std::vector<int32_t> const& own = mSession->contract().stopIds;
    Ids const& asked = turn.request.stopIds;
    if (std::find(own.begin(), own.end(), token) != own.end()
        || std::find(asked.begin(), asked.end(), token) != asked.end())
    {
        end(entry, Reason::kStop);
        return;
    }
    if (!mSession->hasRoom(entry.row))
    {
        end(entry, Reason::kLength);
        return;
    }
    Clock::time_point const now = Clock::now();
    bool const first = turn.generated++ == 0;
    (first ? mCounted.firstTokenSeconds : mCounted.betweenTokensSeconds)
        += seconds(now - (first ? turn.submitted : turn.lastToken));
    ++(first ? mCounted.firstTokens : mCounted.betweenTokens);
    ++mCounted.newTokens;
    turn.lastToken = now;
    turn.pending = token;
    turn.listener->token(token);
}

void Scheduler::end(Entry& entry, Reason reason)
{
    mSession->endTurn(entry.row);
    finish(entry, {reason, 0, 0, std::nullopt}, false, false);
}

void Scheduler::fail(Entry& entry, std::string const& why)
{
    bool undone = false;
    bool const dropped = !takenBack(entry, false, undone);
    finish(entry, {Reason::kError, 0, 0, Failure{Fault::kFailed, why}}, dropped, undone);
}

// Makes a session what it was before its running turn; or with `keep`, where it cannot be because something was
// compressed meanwhile, ends a turn whose prompt is whole. False: neither was to be done.
bool Scheduler::takenBack(Entry& entry, bool keep, bool& undone)
{
    Turn const& turn = *entry.turns.front();
    try
    {
        mSession->checkRow(entry.row);
        if (turn.appended > 0)
        {
            mSession->undoTurn(entry.row);
        }
        undone = true;
        return true;
    }
    catch (Error const&)
    {
        if (!keep || turn.promptLeft())
        {
            return false;
        }
    }
    try
    {
        mSession->checkRow(entry.row);
        mSession->endTurn(entry.row);
        return true;
    }
    catch (std::exception const&)
    {
        return false;
    }
}

// A turn is no longer running; `undone`: it was taken back; `dropped`: its session is gone with it.
void Scheduler::finish(Entry& entry, Finished last, bool dropped, bool undone)
{
    mRows[static_cast<size_t>(entry.row)] = nullptr;
    entry.running = false;
    entry.used = Clock::now();
    std::unique_ptr<Turn> const turn = std::move(entry.turns.front());
    entry.turns.pop_front();
    ++mCounted.turns;
    mCounted.cancelled += last.reason == Reason::kCancelled;
    mCounted.failed += last.reason == Reason::kError;
    // A session whose only turn was taken back has never begun: there is nothing to hold a row for.
    bool const nothing = undone && turn->before == 0;
    if (dropped)
    {
        while (!entry.turns.empty())
        {
            std::unique_ptr<Turn> const next = std::move(entry.turns.front());
            entry.turns.pop_front();
            refuse(*next, Failure{Fault::kFailed, "session " + entry.name + ": the session is gone."});
        }
        forget(entry);
    }
    else if ((turn->request.endSession || nothing) && entry.turns.empty())
    {
        forget(entry);
    }
    else if (turn->request.endSession)
    {
        mSession->reset(entry.row);
    }
    last.promptTokens = turn->before + static_cast<int64_t>(turn->appended);
    last.cachedTokens = turn->before;
    turn->listener->finished(last);
}

// Gives up every turn, without another call of the engine.
void Scheduler::failAll(std::string const& why)
{
    for (auto const& [key, entry] : mEntries)
    {
        for (auto const& turn : entry->turns)
        {
            ++mCounted.turns;
            ++mCounted.failed;
            turn->listener->finished({Reason::kError, 0, 0, Failure{Fault::kUnavailable, why + "."}});
        }
        entry->turns.clear();
        entry->running = false;
    }
    std::fill(mRows.begin(), mRows.end(), nullptr);
    std::lock_guard<std::mutex> const guard(mLock);
    mWaiting = 0;
}
} // namespace semkv::runtime

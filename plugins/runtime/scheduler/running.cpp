// Turns that have a row: their prompts are appended piece by piece, and one token to all of them in one run. As
// semkv_deploy/serve/running.py.
#include "scheduler/scheduler.h"

#include <algorithm>

namespace semkv::runtime
{
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
    size_t const end = turn.appended < turn.pinned ? turn.pinned : turn.ids.size();
    size_t const count = std::min(end - turn.appended, static_cast<size_t>(mSession->contract().prefillChunk));
    std::vector<Ids> prompts(rows);
    auto const from = turn.ids.begin() + static_cast<std::ptrdiff_t>(turn.appended);
    prompts[row].assign(from, from + static_cast<std::ptrdiff_t>(count));
    try
    {
        float const* const logits = mSession->prefill(prompts);
        turn.appended += count;
        mCounted.promptTokens += static_cast<int64_t>(count);
        int64_t const vocab = mSession->contract().vocabSize;
        // Copied: to pin may run the model, and logits live until then.
        auto const at = logits + static_cast<int64_t>(row) * vocab;
        std::vector<float> const last(at, at + vocab);
        if (turn.appended == turn.pinned)
        {
            mSession->pin(entry.row);
        }
        if (!turn.promptLeft())
        {
            choose(entry, last.data());
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
        turn.reply->appended();
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
    if (turn.reply->ends(token))
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
    turn.listener->piece({token}, turn.reply->push(token));
    if (turn.reply->stopped())
    {
        end(entry, Reason::kStop);
        return;
    }
    turn.pending = token;
}

void Scheduler::end(Entry& entry, Reason reason)
{
    Turn& turn = *entry.turns.front();
    std::string const rest = turn.reply->flush();
    if (!rest.empty())
    {
        turn.listener->piece({}, rest);
    }
    mSession->endTurn(entry.row);
    record(entry);
    finish(entry, {reason, 0, 0, std::nullopt}, Left::kEnded);
}

// A conversation has the turn's messages, and the reply as far as the cache has it.
void Scheduler::record(Entry& entry)
{
    Turn const& turn = *entry.turns.front();
    if (!turn.request.messages.empty())
    {
        entry.conversation->record(turn.request.messages, turn.reply->reply());
    }
}

void Scheduler::fail(Entry& entry, std::string const& why)
{
    Left const left = takenBack(entry, false);
    finish(entry, {Reason::kError, 0, 0, Failure{Fault::kFailed, why}}, left);
}
} // namespace semkv::runtime

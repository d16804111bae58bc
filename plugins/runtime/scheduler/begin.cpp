// What a turn is asked, looked at as it is given, and made tokens of as it begins.
#include "scheduler/scheduler.h"

#include "text/utf8.h"

#include <algorithm>

namespace semkv::runtime
{
// Throws SEMKV_BAD_ARGUMENT for a request that no session can serve; SEMKV_NO_TARGET where texts are wanted and there
// are none.
void Scheduler::check(Request const& request) const
{
    std::string given;
    for (auto const& [name, there] : {std::pair{"ids", !request.ids.empty()}, {"text", !request.text.empty()},
             {"messages", !request.messages.empty()}})
    {
        given += there ? (given.empty() ? "" : " and ") + std::string(name) : "";
    }
    if (given.empty() || given.find(' ') != std::string::npos)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "a turn has one of ids, text and messages")
            .where("request")
            .got(given.empty() ? "none" : given);
    }
    if (request.maxNewTokens > mMaxTokens)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "more tokens than a reply may have")
            .where("request")
            .expected("at most " + std::to_string(mMaxTokens))
            .got(std::to_string(request.maxNewTokens));
    }
    if (request.maxNewTokens < 1)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "out of range")
            .where("max_tokens")
            .expected("1 to " + std::to_string(mMaxTokens))
            .got(std::to_string(request.maxNewTokens));
    }
    for (std::string const& each : request.stop)
    {
        text::requireUtf8(each, "stop");
        if (each.empty())
        {
            throw Error(SEMKV_BAD_ARGUMENT, "an empty text would end every reply").where("stop");
        }
    }
    if (request.ids.empty() || (!request.stop.empty() && mTexts->detokenizer() == nullptr))
    {
        mTexts->tokenizer();
    }
    if (!request.messages.empty() && !mTexts->hasTemplate())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "the tokenizer has no chat template")
            .where("messages")
            .fix("give ids, or text as it is");
    }
}

// Begins the first turn of a session that has a row; where its prompt is refused, nothing has happened.
void Scheduler::begin(Entry& entry)
{
    Turn& turn = *entry.turns.front();
    try
    {
        turn.ids = promptOf(entry, turn);
        mSession->checkAppend(entry.row, turn.ids);
    }
    catch (Error const& error)
    {
        withdraw(entry, 0, failure(error.code() == SEMKV_RUNTIME ? Fault::kFailed : Fault::kInvalid, error));
        return;
    }
    std::vector<int32_t> const& own = mSession->contract().stopIds;
    Ids stops = turn.request.stopIds;
    stops.insert(stops.end(), own.begin(), own.end());
    if (!turn.request.messages.empty())
    {
        stops.insert(stops.end(), mTexts->ends().begin(), mTexts->ends().end());
    }
    turn.reply.emplace(mTexts->detokenizer(), std::move(stops), turn.request.stop);
    turn.before = mSession->slots().at(entry.row);
    mRows[static_cast<size_t>(entry.row)] = &entry;
    entry.running = true;
    std::lock_guard<std::mutex> const guard(mLock);
    --mWaiting;
}

Ids Scheduler::promptOf(Entry& entry, Turn& turn)
{
    Request const& request = turn.request;
    bool const chat = !request.messages.empty(), inMessages = entry.conversation && !entry.conversation->empty();
    if (inMessages != chat && mSession->slots().at(entry.row) > 0)
    {
        throw Error(SEMKV_BAD_ARGUMENT, "a session is of messages or of tokens, from its first turn on")
            .where("session " + entry.name)
            .expected(inMessages ? "messages" : "ids or text");
    }
    if (!chat && request.text.empty())
    {
        return request.ids;
    }
    text::Ids made;
    if (chat)
    {
        if (!entry.conversation)
        {
            entry.conversation.emplace(mTexts->tokenizer());
        }
        made = entry.conversation->tokens(request.messages);
        turn.pinned = mSession->keepsTurns() ? entry.conversation->pinned() : 0;
    }
    else
    {
        made = mTexts->tokenizer().encodeAlone(request.text);
    }
    int64_t const vocab = mSession->contract().vocabSize;
    auto const beyond = std::find_if(made.begin(), made.end(), [&](int32_t id) { return id >= vocab; });
    if (beyond != made.end())
    {
        throw Error(SEMKV_BAD_ARGUMENT, "the text has a token that the model does not have")
            .where("prompt")
            .expected("ids below " + std::to_string(vocab))
            .got(std::to_string(*beyond));
    }
    return Ids(made.begin(), made.end());
}
} // namespace semkv::runtime

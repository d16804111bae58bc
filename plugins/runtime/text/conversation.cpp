#include "text/conversation.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace semkv::text
{
using nlohmann::json;

namespace
{
bool startsWith(std::string const& text, std::string const& with)
{
    return text.compare(0, with.size(), with) == 0;
}

// The template's text after a reply, less what the cache holds of it already, with what the cache lacks of it.
std::string after(Reply const& reply, std::string const& added)
{
    if (startsWith(reply.cached, reply.text))
    {
        std::string const begun = reply.cached.substr(reply.text.size());
        return startsWith(added, begun) ? added.substr(begun.size()) : added;
    }
    return (reply.text.size() > reply.cached.size() ? reply.text.substr(reply.cached.size()) : "") + added;
}
} // namespace

Conversation::Conversation(Tokenizer const& tokenizer, json const& state)
    : mTokenizer(tokenizer)
{
    for (json const& each : state.at("messages"))
    {
        mMessages.push_back({each.at("role"), each.at("content")});
    }
    if (!state.at("cached").is_null() && !mMessages.empty())
    {
        mLast = Reply{mMessages.back().content, state.at("cached")};
    }
}

Ids Conversation::tokens(Messages const& added)
{
    mPinned = 0;
    if (mLast)
    {
        Messages const before(mMessages.begin(), mMessages.end() - 1);
        return encodeFollowing(mTokenizer, after(*mLast, afterReply(mTokenizer, before, added)));
    }
    Messages all = mMessages;
    all.insert(all.end(), added.begin(), added.end());
    Ids ids = opening(mTokenizer, all);
    mPinned = systemTokens(all, ids);
    return ids;
}

void Conversation::record(Messages const& added, Reply reply)
{
    mMessages.insert(mMessages.end(), added.begin(), added.end());
    mMessages.push_back({"assistant", reply.text});
    mLast = std::move(reply);
}

json Conversation::state() const
{
    json messages = json::array();
    for (Message const& each : mMessages)
    {
        messages.push_back({{"role", each.role}, {"content", each.content}});
    }
    return {{"messages", messages}, {"cached", mLast ? json(mLast->cached) : json()}};
}

// How many tokens of an opening are its system messages': what it is without a user's.
size_t Conversation::systemTokens(Messages const& opening, Ids const& ids) const
{
    auto const users = std::find_if(
        opening.begin(), opening.end(), [](Message const& each) { return each.role != "system"; });
    Ids const alone = mTokenizer.encode(beforeUser(mTokenizer, Messages(opening.begin(), users)));
    auto const end = std::min(alone.size(), ids.size());
    return static_cast<size_t>(
        std::mismatch(alone.begin(), alone.begin() + static_cast<ptrdiff_t>(end), ids.begin()).first - alone.begin());
}
} // namespace semkv::text

// A conversation in messages: the tokens that each turn adds to a cache, which keeps replies as they were generated. As
// semkv_deploy/runtime/conversation.py.
#pragma once

#include "text/reply.h"
#include "text/turns.h"

#include <nlohmann/json_fwd.hpp>

#include <optional>
#include <string>

namespace semkv::text
{
class Conversation
{
public:
    // The tokenizer must outlive it.
    explicit Conversation(Tokenizer const& tokenizer)
        : mTokenizer(tokenizer)
    {
    }

    // The conversation that `state` is of. Throws nlohmann's exceptions for what is none.
    Conversation(Tokenizer const& tokenizer, nlohmann::json const& state);

    // Ids to append before the reply to these messages, the user's last of all. Throws SEMKV_BAD_ARGUMENT where the
    // template refuses them.
    Ids tokens(Messages const& added);

    // How many of the last `tokens` are the system message's, where they open the conversation.
    size_t pinned() const
    {
        return mPinned;
    }

    // Adds messages and the reply to them.
    void record(Messages const& added, Reply reply);

    bool empty() const
    {
        return mMessages.empty();
    }

    // As JSON takes it, and Python's Conversation.restored.
    nlohmann::json state() const;

private:
    size_t systemTokens(Messages const& opening, Ids const& ids) const;

    Tokenizer const& mTokenizer;
    Messages mMessages;
    std::optional<Reply> mLast;
    size_t mPinned = 0;
};
} // namespace semkv::text

// The turns of a chat as a template writes them, as semkv_deploy/model/turns.py: what opens it, what stands between a
// reply and the next one. A cache has replies as they were generated, so that earlier turns are never written again:
// what is new is found with a reply that the template cannot know.
#pragma once

#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace semkv::text
{
// Ids of the conversation before its first reply.
Ids opening(Tokenizer const& tokenizer, std::vector<Message> const& messages);

// Ids of what follows the assistant's last message, up to where the next reply begins. Throws SEMKV_BAD_ARGUMENT where
// there is none, or nothing after it.
Ids following(Tokenizer const& tokenizer, std::vector<Message> const& messages);

// Ids of the tokens with which the template ends a reply, or, without such, opens the next turn.
Ids endIds(Tokenizer const& tokenizer, Detokenizer const& detokenizer);
} // namespace semkv::text
